"""Checkpoints in one file on the model that they belong to: at 16 bits, at 4 bits, and wrong ones."""

from __future__ import annotations

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
    from mm.quantization import config

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
