"""Checkpoints in one file on the model that they belong to: at 16 bits, at 4 bits, and wrong ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import SIDE, tiny_pipeline_of
from typer.testing import CliRunner

import mm
import mm.cli
from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear

ASKED: dict[str, Any] = {"seed": 1, "steps": 2, "size": (SIDE, SIDE)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, Any]:
    """A Qwen-Image folder, another denoiser for it in one file in ComfyUI's names, and the pipeline of both."""
    root = tmp_path_factory.mktemp("single")
    tiny_pipeline_of("qwen-image").save_pretrained(root / "base")
    pipe = tiny_pipeline_of("qwen-image")
    torch.manual_seed(7)
    for parameter in pipe.transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in pipe.transformer.state_dict().items()}
    save_file(tensors, root / "fine-tuned.safetensors")
    return root / "fine-tuned.safetensors", root / "base", pipe


def test_a_denoiser_draws_on_its_base(files, tmp_path: Path) -> None:
    file, base, pipe = files
    engine = mm.load(file, base=base, dtype="float32")
    own, theirs = engine.pipeline.transformer.state_dict(), pipe.transformer.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name].cpu(), theirs[name].cpu()) for name in own)
    words = ["generate", "a fox", "--model", str(file), "--base", str(base), "--size", f"{SIDE}x{SIDE}"]
    words += ["--steps", "2", "--seed", "1", "--dtype", "float32", "-o", str(tmp_path / "a.png")]
    done = CliRunner().invoke(mm.cli.app, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.png").is_file()


def test_its_4_bit_copy_is_made_once(files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.quantization import config, quantize  # `quantize` takes the class before it is replaced

    assert quantize.SVDQuantConfig is config.SVDQuantConfig
    file, base, _ = files
    monkeypatch.setenv("MM_CACHE", str(tmp_path))
    quick = config.SVDQuantConfig(rank=4, data_free=True)
    monkeypatch.setattr(config, "SVDQuantConfig", lambda bits: quick)
    engine = mm.load(file, base=base, bits=4, dtype="float32")
    quantized = [m for m in engine.pipeline.transformer.modules() if isinstance(m, BranchedLinear) and m.bits == 4]
    assert len(quantized) > 4
    copies = list((tmp_path / "quantized").iterdir())
    assert len(copies) == 1  # the 16-bit folder between is gone
    assert (copies[0] / "report.json").is_file()
    made = (copies[0] / "report.json").stat().st_mtime_ns
    again = mm.load(file, base=base, bits=4, dtype="float32")
    assert (copies[0] / "report.json").stat().st_mtime_ns == made
    one, other = (each.draw("a fox", **ASKED)[0].tobytes() for each in (engine, again))
    assert one == other


def test_mm_quantize_takes_the_file(files, tmp_path: Path) -> None:
    file, base, _ = files
    words = ["quantize", str(file), "--base", str(base), "-o", str(tmp_path / "small"), "--data-free", "--rank", "4"]
    done = CliRunner().invoke(mm.cli.app, [*words, "--pictures", "0"])
    assert done.exit_code == 0, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert mm.load(tmp_path / "small", dtype="float32").draw("a fox", **ASKED)
    wrong = CliRunner().invoke(mm.cli.app, ["quantize", str(base), "--base", str(base), "-o", str(tmp_path / "other")])
    assert wrong.exit_code == 1
    assert "belongs to a model in a single file" in wrong.stderr


def test_wrong_files_and_bases_are_refused(files, tmp_path: Path) -> None:
    file, base, _ = files
    other = tmp_path / "other.safetensors"
    save_file({"model.diffusion_model.img_in.weight": torch.zeros(3, 5)}, other)
    with pytest.raises(UserError, match="cannot be loaded as QwenImageTransformer2DModel"):
        mm.load(other, base=base)
    with pytest.raises(UserError, match="base belongs to a model in a single file"):
        mm.load(base, base=base)
    with pytest.raises(UserError, match="no model"):
        mm.load(file, base=tmp_path / "gone")


def _floats_of_8_bits(tensors: dict[str, torch.Tensor], end: str) -> dict[str, torch.Tensor]:
    """Linear weights as ComfyUI stores them: 8-bit floats, and one scale a layer under `end`."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim != 2 or layer == name:
            made[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        made |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{layer}.{end}": scale.clone()}
        if end == "weight_scale":
            made[f"{layer}.comfy_quant"] = _as_bytes({"format": "float8_e4m3fn"})
            made[f"{layer}.input_scale"] = torch.ones(())
    return made if end == "weight_scale" else made | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


def _as_bytes(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
def test_scales_of_8_bit_floats_count(files, tmp_path: Path, end: str, prefix: str) -> None:
    _, base, pipe = files
    theirs = pipe.transformer.state_dict()
    file = tmp_path / "scaled.sft"
    save_file({f"{prefix}{name}": x for name, x in _floats_of_8_bits(theirs, end).items()}, file)
    own = mm.load(file, base=base, dtype="float32").pipeline.transformer.state_dict()
    for name, tensor in theirs.items():  # 8-bit floats keep 3 bits, bfloat16 keeps 7
        assert (own[name] - tensor).norm() <= 0.04 * tensor.norm(), name


def test_a_scale_a_row_counts(files, tmp_path: Path) -> None:
    _, base, pipe = files
    tensors = dict(pipe.transformer.state_dict())
    name = "transformer_blocks.0.attn.to_q"
    weight = tensors[f"{name}.weight"]
    scales = weight.abs().amax(1, keepdim=True) / 448
    tensors |= {f"{name}.weight": (weight / scales).to(torch.float8_e4m3fn), f"{name}.weight_scale": scales}
    save_file(tensors, tmp_path / "rows.safetensors")
    own = mm.load(tmp_path / "rows.safetensors", base=base, dtype="float32").pipeline.transformer
    assert (own.get_submodule(name).weight - weight).norm() <= 0.04 * weight.norm()


def _with(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name: tensor}


Q = "transformer_blocks.0.attn.to_q"
DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "int8": (_with(f"{Q}.weight", torch.ones(64, 64, dtype=torch.int8)), "is of type I8; give the file"),
    "nf4": (
        _with(f"{Q}.weight.quant_state.bitsandbytes__nf4", torch.zeros(88, dtype=torch.uint8)),
        "packed by bitsandbytes",
    ),
    "nvfp4": (_with(f"{Q}.weight_scale_2", torch.ones(())), "packed by NVFP4"),
    "format": (_with(f"{Q}.comfy_quant", _as_bytes({"format": "mxfp8"})), 'has the format "mxfp8"'),
    "blocks": (_with(f"{Q}.weight_scale", torch.ones(64, 2)), r"has shape \[64, 2\]"),
    "scale": (_with("gone.weight_scale", torch.ones(())), "has no .*gone.weight"),
    "nan": (_with(f"{Q}.weight", torch.full((64, 64), torch.nan)), "holds NaN"),
    "more": (_with("transformer_blocks.9.attn.to_q.weight", torch.ones(2, 2)), "has no place"),
    "less": (lambda x: {k: v for k, v in x.items() if k != f"{Q}.weight"}, "lacks weights"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_packed_and_damaged_denoisers_are_refused(files, tmp_path: Path, kind: str) -> None:
    _, base, pipe = files
    change, why = DAMAGED[kind]
    save_file(change(dict(pipe.transformer.state_dict())), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=why):
        mm.load(tmp_path / "a.safetensors", base=base)


def test_what_is_no_safetensors_file_is_named(files, tmp_path: Path) -> None:
    _, base, pipe = files
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(200))
    for options in ({}, {"base": base}):
        with pytest.raises(UserError, match="it is a GGUF file"):
            mm.load(tmp_path / "a.gguf", **options)
    tensors = _floats_of_8_bits(pipe.transformer.state_dict(), "scale_weight")
    whole = {f"model.diffusion_model.{name}": x for name, x in tensors.items()} | {"vae.a": torch.ones(2, 2)}
    save_file(whole, tmp_path / "whole.safetensors")
    for options in ({}, {"base": base}):
        with pytest.raises(UserError, match="a file of the denoiser alone"):
            mm.load(tmp_path / "whole.safetensors", **options)
