"""The readers that `fuzzing.py` runs: valid files of each, how they are changed, and what must stay as it was."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_mutations import bytes_changed, dumped, json_changed, png_changed, tensors_changed, text_changed


@dataclass
class Case:
    """A reader: `mutate` writes a damaged input, `read` runs the reader on it; `unchanged` is asked after refusals."""

    mutate: Callable[[random.Random], Any]
    read: Callable[[], Any]
    unchanged: Callable[[], bool] = field(default=lambda: True)


def _print_of(model: Any) -> tuple[Any, ...]:
    """What a model is: its layers' types and its tensors' sums."""
    kinds = tuple((name, type(part).__name__) for name, part in model.named_modules())
    sums = tuple((name, str(t.dtype), float(t.double().sum())) for name, t in model.state_dict().items())
    return kinds + sums


def _patch(folder: Path) -> Case:
    from adapter_cases import WORDS, K, five, text_encoder

    from mm.adapters.patch import Patch

    model, path = text_encoder(), folder / "a.safetensors"
    valid = []
    for patch in five():
        patch.save(path)
        valid.append(path.read_bytes())
    assert K and WORDS
    before = _print_of(model)

    def read() -> None:
        patch = Patch.load(path)
        patch.apply(model)
        patch.verify(model)
        patch.undo(model)
        if _print_of(model) != before:
            raise AssertionError("undoing left a change")

    return Case(
        mutate=lambda rng: path.write_bytes(_some(rng.choice(valid), rng, tensors_changed)),
        read=read,
        unchanged=lambda: _print_of(model) == before,
    )


def _lora(folder: Path) -> Case:
    import peft
    from adapter_cases import text_encoder

    from mm import read_lora

    valid = []
    for options in ({}, {"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, **options)
        peft.get_peft_model(text_encoder(), config).save_pretrained(folder / "made")
        weights, settings = (folder / "made" / n for n in ("adapter_model.safetensors", "adapter_config.json"))
        valid.append((weights.read_bytes(), settings.read_bytes()))
    model = text_encoder()
    before = _print_of(model)
    where = folder / "adapter"
    where.mkdir()

    def mutate(rng: random.Random) -> None:
        weights, settings = rng.choice(valid)
        if rng.random() < 0.4:
            settings = _some(settings, rng, _json_file)
        else:
            weights = _some(weights, rng, tensors_changed)
        (where / "adapter_model.safetensors").write_bytes(weights)
        (where / "adapter_config.json").write_bytes(settings)

    def read() -> None:
        patch = read_lora(where, model)
        patch.apply(model)
        patch.undo(model)
        if _print_of(model) != before:
            raise AssertionError("undoing left a change")

    return Case(mutate=mutate, read=read, unchanged=lambda: _print_of(model) == before)


def _nunchaku(folder: Path) -> Case:
    from nunchaku_files import flux, published, write

    from mm.quantization.integrations.nunchaku import load_nunchaku, read_nunchaku

    path, valid = folder / "a.safetensors", []
    for version, fp4 in ((1, False), (2, True)):
        valid.append(write(path, *published(version, fp4)).read_bytes())
    model = flux()
    before = _print_of(model)
    state = {"turn": 0}

    def read() -> None:
        state["turn"] += 1
        if state["turn"] % 2:
            load_nunchaku(path)
        else:
            fresh = flux()
            fresh.load_state_dict(model.state_dict())
            state["model"] = fresh
            read_nunchaku(path, fresh)
            del state["model"]

    def unchanged() -> bool:
        fresh = state.pop("model", None)
        return fresh is None or _print_of(fresh) == before

    return Case(
        mutate=lambda rng: path.write_bytes(_some(rng.choice(valid), rng, tensors_changed)),
        read=read,
        unchanged=unchanged,
    )


def _folder(folder: Path) -> Case:
    from tiny import draw, tiny_pipeline

    from mm import SVDQuantConfig, TextToImagePipeline, quantize

    valid = folder / "valid"
    tiny_pipeline().save_pretrained(valid)
    small = tiny_pipeline(codes=False)
    quantize(small, SVDQuantConfig(rank=4, data_free=True), progress=False)
    small.save_pretrained(folder / "small")
    where = folder / "model"

    def mutate(rng: random.Random) -> None:
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(rng.choice((valid, folder / "small")), where)
        files = sorted(path for path in where.rglob("*") if path.is_file())
        by_kind = [[p for p in files if p.suffix == ".json"], [p for p in files if p.suffix == ".safetensors"]]
        path = rng.choice(by_kind[rng.random() < 0.4])
        how = tensors_changed if path.suffix == ".safetensors" else _json_file
        if rng.random() < 0.04:
            path.unlink()
        else:
            path.write_bytes(_some(path.read_bytes(), rng, how))

    def read() -> None:
        pipe = TextToImagePipeline.from_pretrained(where)
        pipe.set_progress_bar_config(disable=True)
        if not draw(pipe, num_inference_steps=1).isfinite().all():
            raise AssertionError("a picture that is not finite")

    return Case(mutate=mutate, read=read)


def _png(folder: Path) -> Case:
    from foreign_samples import SAMPLES
    from PIL import Image, PngImagePlugin

    from mm.core.png_settings import drawing_settings, png_bytes, read_settings

    path, valid = folder / "a.png", []
    for texts in SAMPLES:
        chunks = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            chunks.add_itxt(key, text)
        Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
        valid.append(path.read_bytes())
    settings = drawing_settings(prompt="é two cats", seed=7, steps=12, mode="flow", guidance=4.0, model="mm-tiny")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("mm", json.dumps(settings))
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    valid += [path.read_bytes()]
    assert png_bytes(Image.new("RGB", (8, 8)), settings)

    def read() -> None:
        found = read_settings(path)
        if not isinstance(found, dict):
            raise AssertionError("settings that are no dict")
        json.dumps(found, allow_nan=False)

    return Case(mutate=lambda rng: path.write_bytes(_some(rng.choice(valid), rng, png_changed)), read=read)


def _json_file(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return text_changed(data.decode(), rng)
    return dumped(json_changed(json.loads(data), rng), rng)


def _some(data: bytes, rng: random.Random, change: Callable[[bytes, random.Random], bytes]) -> bytes:
    """One change, at times two or three; what can no longer be parsed is changed by bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = change(data, rng)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            data = bytes_changed(data, rng)
    return data


MAKERS = {"patch": _patch, "lora": _lora, "nunchaku": _nunchaku, "folder": _folder, "png": _png}
