"""Model folders as they lie on disks: one variant alone, parts that other libraries quantized or pickled, no VAE."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import SIDE, tiny_pipeline_of

import mm
from mm.core.errors import UserError
from mm.core.logged import warnings_of
from mm.core.model_parts import save_pipeline
from mm.core.part_files import only_variant
from mm.engine.advice import advice
from mm.quantization import folders
from mm.quantization.copies import quantized_copy
from mm.quantization.folders import quantize_folder

QUICK = mm.SVDQuantConfig(rank=4, data_free=True)
ASKED: dict[str, Any] = {"seed": 1, "steps": 1, "size": (SIDE, SIDE)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A FLUX folder."""
    folder: Path = tmp_path_factory.mktemp("folders") / "flux"
    tiny_pipeline_of("flux").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_one_variant_alone_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str) -> None:
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "fp16"
    tiny_pipeline_of("stable-diffusion-xl").to(torch.float16).save_pretrained(
        folder, variant="fp16", max_shard_size=shard
    )
    assert mm.load(folder).draw("a fox", **ASKED)
    assert mm.load(quantized_copy(folder, QUICK, progress=False)).draw("a fox", **ASKED)
    assert advice(folder).sixteen > 0
    report = quantize_folder(folder, tmp_path / "small", QUICK, progress=False)
    stored = torch.float16
    assert report.whole["folder_before"] > report.whole["folder_after"]
    saved = mm.load(tmp_path / "small", dtype="float16").pipeline.unet
    assert {t.dtype for t in saved.state_dict().values() if t.is_floating_point()} == {stored}


def test_the_plain_files_win_over_a_variant(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(plain, folder)
    part = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(part, part.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert only_variant(folder) is None
    part.rename(part.with_name("diffusion_pytorch_model.ema.safetensors"))
    assert only_variant(folder) == "ema"
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    part.with_name("diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(UserError, match="several variants"):
        mm.load(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "quanto", "torchao", "an_unknown_one"])
def test_a_denoiser_of_another_quantizer_is_named(plain: Path, tmp_path: Path, method: str) -> None:
    folder = _quantized_by(plain, tmp_path, "transformer", method)
    with pytest.raises(UserError, match=f"cannot be loaded: transformer is quantized by {method}, and its library"):
        mm.load(folder)
    for make in (lambda: mm.load(folder, bits=4), lambda: quantize_folder(folder, tmp_path / "small", QUICK)):
        with pytest.raises(UserError, match=f"cannot be quantized: transformer is quantized by {method}"):
            make()
    assert not (tmp_path / "small").exists()
    assert any(f"quantized by {method}" in line for line in advice(folder).lines())


def test_a_text_encoder_of_another_quantizer_is_named_where_it_does_not_load(plain: Path, tmp_path: Path) -> None:
    folder = _quantized_by(plain, tmp_path, "text_encoder_2", "bitsandbytes")
    for make in (lambda: mm.load(folder), lambda: quantize_folder(folder, tmp_path / "small", QUICK)):
        with pytest.raises(UserError, match="cannot be loaded: text_encoder_2 is quantized by bitsandbytes"):
            make()


def _quantized_by(plain: Path, tmp_path: Path, part: str, method: str) -> Path:
    folder = tmp_path / "packed"
    shutil.copytree(plain, folder)
    file = folder / part / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_what_cannot_be_loaded_is_one_line_at_every_door(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "without"
    shutil.copytree(plain, folder)
    index = folder / "model_index.json"
    entries = json.loads(index.read_text(encoding="utf-8")) | {"vae": [None, None]}
    index.write_text(json.dumps(entries), encoding="utf-8")
    shutil.rmtree(folder / "vae")
    for make in (
        lambda: mm.load(folder),
        lambda: mm.load(folder, bits=4),
        lambda: quantize_folder(folder, tmp_path / "small", QUICK),
    ):
        with pytest.raises(UserError, match="cannot be loaded"):
            make()


def test_pickles_are_named_at_every_door(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(plain, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    for make in (
        lambda: mm.load(folder),
        lambda: advice(folder),
        lambda: quantize_folder(folder, tmp_path / "small", QUICK),
    ):
        with pytest.raises(UserError, match="is a pickle"):
            make()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2"])
def test_a_part_without_weights_is_named_at_every_door(plain: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(plain, folder)
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    for make in (
        lambda: mm.load(folder),
        lambda: advice(folder),
        lambda: quantize_folder(folder, tmp_path / "small", QUICK),
    ):
        with pytest.raises(UserError, match=f"{part} holds the config of a model and no weights"):
            make()


def test_a_copy_belongs_to_the_settings_of_its_source_too(plain: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "flux"
    shutil.copytree(plain, folder)
    first = quantized_copy(folder, QUICK, progress=False)
    assert quantized_copy(folder, QUICK, progress=False) == first
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"shift": 3.0}
    file.write_text(json.dumps(settings), encoding="utf-8")
    second = quantized_copy(folder, QUICK, progress=False)
    assert second != first
    assert mm.load(second).pipeline.scheduler.config.shift == 3.0


@pytest.mark.skipif(os.name != "posix", reason="no flock")
def test_two_processes_make_one_copy(plain: Path, tmp_path: Path) -> None:
    code = (
        "import sys, mm\n"
        "from mm.quantization.copies import quantized_copy\n"
        "config = mm.SVDQuantConfig(rank=4, data_free=True)\n"
        "print(quantized_copy(sys.argv[1], config, progress=False))\n"
    )
    environment = os.environ | {"MM_CACHE": str(tmp_path / "cache")}
    made = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(plain)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    done = [process.communicate(timeout=300) for process in made]
    assert [process.returncode for process in made] == [0, 0, 0], done
    assert len({out for out, _ in done}) == 1
    copies = [path.name for path in (tmp_path / "cache" / "quantized").iterdir()]
    assert len(copies) == 1  # and no lock is left
    assert any("another process makes" in err for _, err in done)


@pytest.mark.skipif(os.name != "posix", reason="no flock")
def test_a_folder_that_another_process_writes_is_refused(plain: Path, tmp_path: Path, monkeypatch) -> None:
    from mm.core.locks import locked

    out = tmp_path / "small"
    with locked(out / ".parts" / ".running"), pytest.raises(UserError, match="another process writes"):
        quantize_folder(plain, out, QUICK, progress=False)
    (out / ".parts").rmdir()
    opened = folders._opened

    def slow(*arguments: Any) -> Any:  # another process begins and ends while this one loads the model
        monkeypatch.setattr(folders, "_opened", opened)
        quantize_folder(plain, out, QUICK, progress=False)
        return opened(*arguments)

    monkeypatch.setattr(folders, "_opened", slow)
    with pytest.raises(UserError, match="was written by another process meanwhile"):
        quantize_folder(plain, out, QUICK, progress=False)
    assert not (out / ".parts").exists()
    assert mm.load(out).draw("a fox", **ASKED)


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if name.endswith("weight"))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_missing_weights_and_nan_are_named_at_every_door(plain: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(plain, folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = _first(tensors)
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    bad = tensors[name].clone()
    bad.view(-1)[0] = torch.nan
    for change, why in ((kept, "is in no file|of a text encoder is in no file"), (kept | {name: bad}, "holds NaN")):
        save_file(change, file, {"format": "pt"})
        for make in (lambda: mm.load(folder), lambda: quantize_folder(folder, tmp_path / "small", QUICK)):
            with pytest.raises(UserError, match=why):
                make()
    assert not (tmp_path / "small").exists()


def test_a_damaged_copy_in_the_cache_says_how_to_make_it_again(plain: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mm.engine.loading._quantized", lambda *_: quantized_copy(plain, QUICK, progress=False))
    mm.load(plain, bits=4)
    (file,) = (tmp_path / "cache").rglob("transformer/*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"copy it again; remove the folder .*cache.*, and the next call makes"):
        mm.load(plain, bits=4)


def test_a_full_disk_is_one_line_whatever_library_meets_it(tmp_path: Path) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"cannot be written \(No space left .* free some space"):
        save_pipeline(Full(), tmp_path)


@pytest.mark.parametrize("level", [logging.NOTSET, logging.ERROR])
def test_warnings_of_a_library_are_heard_and_its_level_stays(level: int, caplog: pytest.LogCaptureFixture) -> None:
    logger, said = logging.getLogger("mm.tests.a_library"), list[str]()
    logger.setLevel(level)
    with warnings_of(logger.name, said):
        assert logger.level < logging.WARNING or level == logging.NOTSET
        logger.warning("lost")
    assert said == ["lost"]
    assert logger.level == level
    assert [record.getMessage() for record in caplog.records] == (["lost"] if level == logging.NOTSET else [])
