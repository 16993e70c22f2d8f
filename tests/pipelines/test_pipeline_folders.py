"""A pipeline's folder: what is saved comes back, what is broken is named, what is offloaded still draws."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tiny import draw, tiny_pipeline

from mm import TextToImagePipeline
from mm.core.errors import UserError


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return tiny_pipeline()


@pytest.mark.parametrize("mode", ["flow", "codes"])
def test_save_and_load_give_the_same_picture(pipe: TextToImagePipeline, tmp_path: Path, mode: str) -> None:
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, mode=mode), draw(pipe, mode=mode))


def test_a_folder_of_one_variant_needs_no_name_of_it(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, variant="fp16")
    again = TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))


@pytest.mark.parametrize("mode", ["flow", "codes"])
def test_bfloat16_loads_and_draws_nearly_the_same(pipe: TextToImagePipeline, tmp_path: Path, mode: str) -> None:
    pipe.save_pretrained(tmp_path)
    half = TextToImagePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.trunk.dtype == half.code_head.dtype == torch.bfloat16
    picture = draw(half, mode=mode)
    assert picture.isfinite().all()
    if mode == "flow":
        assert (picture - draw(pipe)).abs().mean() < 0.05
    for fast in (True, {"full_every": 2, "guided_from": 0.0, "guided_until": 1.0} if mode == "codes" else {}):
        assert draw(half, mode=mode, fast=fast).isfinite().all()


def test_a_broken_folder_is_named(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    next((tmp_path / "trunk").glob("*.safetensors")).write_bytes(b"\x10\x00garbage")
    with pytest.raises(UserError, match=r"trunk/\S+\.safetensors"):
        TextToImagePipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no-such-model"):
        TextToImagePipeline.from_pretrained("no-such-model")


@pytest.mark.parametrize("file", ["trunk/config.json", "text_tokenizer/tokenizer.json"])
def test_broken_json_is_named(pipe: TextToImagePipeline, tmp_path: Path, file: str) -> None:
    pipe.save_pretrained(tmp_path)
    (tmp_path / file).write_text("{oops")
    with pytest.raises(UserError, match=file):
        TextToImagePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_file_with_other_tensors_never_loads(pipe: TextToImagePipeline, tmp_path: Path, change: str) -> None:
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / "velocity_decoder").glob("*.safetensors")
    tensors = load_file(file)
    name = next(iter(tensors))
    value = tensors.pop(name)
    if change == "unknown":
        tensors |= {name: value, "no.such.tensor": value.clone()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=name if change == "missing" else "no.such.tensor"):
        TextToImagePipeline.from_pretrained(tmp_path)
    brought = TextToImagePipeline.from_pretrained(tmp_path, velocity_decoder=pipe.velocity_decoder)
    assert brought.velocity_decoder is pipe.velocity_decoder


def _edited(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("file", "changes", "why"),
    [
        ("trunk/config.json", {"depth": 10**6}, "depth is 1000000, more than a model of this size has"),
        ("trunk/config.json", {"depth": 900}, "describes a larger model than its weights hold"),
        ("trunk/config.json", {"width": 64}, "has shape"),
        ("trunk/config.json", {"width": 1000, "heads": 500}, "trunk"),
        ("trunk/config.json", {"heads": 0}, "describes no model that can be built"),
        ("trunk/config.json", {"width": "32"}, "trunk/config.json"),
        ("code_head/config.json", {"order": list(range(2000))}, "order has 2000 values"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
        ("model_index.json", {"trunk": ["os", "system"]}, "a Trunk; other classes are passed to the call is needed"),
        ("model_index.json", {"trunk": ["mm.models.velocity", "VelocityDecoder"]}, "a Trunk"),
        ("model_index.json", {"trunk": None}, "trunk is null"),
        ("model_index.json", {"x" * 5000: ["a", "b"]}, "lacks the folders"),
        ("trunk/config.json", {"max_text": 6}, "max_text is 6; prompts take at least 32"),
        ("trunk/config.json", {"reads": 1}, "reads is 1; bool is needed"),
        ("trunk/config.json", {"dept": 2}, 'unknown key "dept"'),
        ("autoencoder/config.json", {"sample_size": 64}, "sample_size is 64, but the trunk needs 128"),
        ("autoencoder/config.json", {"latents_std": [1e308] * 16}, "latents_std is 1e.308"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "scheduler in .* does not work"),
        ("text_tokenizer/tokenizer_config.json", {"model_max_length": {}}, "does not work|cannot be loaded"),
        ("model_index.json", {"scheduler": ["diffusers", "DiffusionPipeline"]}, "a SchedulerMixin"),
    ],
)
def test_settings_that_do_not_fit_the_weights(
    pipe: TextToImagePipeline, tmp_path: Path, file: str, changes: dict[str, Any], why: str
) -> None:
    pipe.save_pretrained(tmp_path)
    _edited(tmp_path / file, **changes)
    with pytest.raises(UserError, match=why):
        TextToImagePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: torch.full_like(x, float("nan")), "holds NaN or infinite values"),
        (lambda x: x.to(torch.int32), "is of type I32; a floating type is needed"),
        (lambda x: x.bool(), "is of type BOOL; a floating type is needed"),
        (lambda x: x[:-1], "has shape"),
    ],
    ids=["nan", "int32", "bool", "shape"],
)
def test_tensors_of_other_kinds_never_load(
    pipe: TextToImagePipeline, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], why: str
) -> None:
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / "velocity_decoder").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=why):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_a_stray_file_completes_nothing(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / "velocity_decoder").glob("*.safetensors")
    shutil.copy(file, file.with_name("backup.safetensors"))
    TextToImagePipeline.from_pretrained(tmp_path)
    tensors = load_file(file)
    gone = next(iter(tensors))
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=gone):
        TextToImagePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../trunk/x.safetensors", "/etc/passwd", "other.bin", "model-2.safetensors", ""])
def test_an_index_names_files_of_its_folder_only(pipe: TextToImagePipeline, tmp_path: Path, name: str) -> None:
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / "velocity_decoder").glob("*.safetensors")
    places = dict.fromkeys(load_file(file), file.name)
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    TextToImagePipeline.from_pretrained(tmp_path)
    index.write_text(json.dumps({"metadata": {}, "weight_map": places | {next(iter(places)): name}}))
    with pytest.raises(UserError, match=r"weight_map|no safetensors file at|does not place there"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_a_pipe_in_a_folder_is_not_waited_for(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    for file in ("trunk/config.json", "text_tokenizer/tokenizer.json", "trunk/diffusion_pytorch_model.safetensors"):
        (tmp_path / file).rename(tmp_path / "kept")
        os.mkfifo(tmp_path / file)
        with pytest.raises(UserError, match=f"{file} is no regular file"):
            TextToImagePipeline.from_pretrained(tmp_path)
        (tmp_path / "kept").replace(tmp_path / file)


def test_pickled_weights_are_never_read(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / "trunk").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    with pytest.raises(UserError, match="use_safetensors"):
        TextToImagePipeline.from_pretrained(tmp_path, use_safetensors=False)
    file.unlink()
    with pytest.raises(UserError, match=r"\.bin is a pickle.*safe_serialization=True"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_a_pipeline_without_codes_comes_back_without_them(tmp_path: Path) -> None:
    tiny_pipeline(codes=False).save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    assert again.code_head is None and again.bridge is None
    with pytest.raises(UserError, match="mode='flow'"):
        draw(again, mode="codes")


@pytest.mark.parametrize("mode", ["flow", "codes"])
def test_sequential_offload_draws_the_same(pipe: TextToImagePipeline, mode: str) -> None:
    """Between calls an offloaded module has no weights at all, also on a CPU: whatever is forgotten fails.

    `enable_sequential_cpu_offload` itself needs an accelerator (it asks for "cpu:0", with which accelerate fails on any
    module), so this does what it does, for the components that it takes.
    """
    offloaded = tiny_pipeline()
    for name, part in offloaded.components.items():
        if isinstance(part, torch.nn.Module) and name not in offloaded._exclude_from_cpu_offload:
            cpu_offload(part, torch.device("cpu"), offload_buffers=True)
    assert offloaded.trunk.place.device.type == "meta"
    assert torch.equal(draw(offloaded, mode=mode), draw(pipe, mode=mode))


def test_model_offload_wakes_a_model_before_each_of_its_doors(pipe: TextToImagePipeline) -> None:
    offloaded, seen = tiny_pipeline(), list[str]()
    offloaded.enable_model_cpu_offload(device="cpu")
    for name in ("trunk", "autoencoder"):
        hook = getattr(offloaded, name)._hf_hook
        wake = hook.pre_forward

        def note(*args: Any, _name: str = name, _wake: Any = wake, **kwargs: Any) -> Any:
            seen.append(_name)
            return _wake(*args, **kwargs)

        hook.pre_forward = note
    assert torch.equal(draw(offloaded, num_inference_steps=2), draw(pipe, num_inference_steps=2))
    assert seen == ["trunk"] * 4 + ["autoencoder"]  # two prompts read, two steps, one picture decoded
