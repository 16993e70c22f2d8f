"""A 4-bit folder that is damaged never loads: not in part, and not with memory that nobody wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_public import TEXT, flux

import mm
from mm.core.errors import UserError

CONFIG = mm.SVDQuantConfig(rank=4, data_free=True)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = flux()
    mm.quantize(model, CONFIG, progress=False)
    model.save_pretrained(folder := tmp_path_factory.mktemp("flux"))
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval()
    mm.quantize(model, CONFIG, progress=False)
    model.save_pretrained(folder := tmp_path_factory.mktemp("text"))
    return folder


def _copy(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The folder with changed tensors."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, out / file.name, metadata={"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


def _first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


@pytest.mark.parametrize("part", ["qweight", "weight_scales", "bias", "down"])
def test_a_missing_tensor_of_diffusers(flux_folder: Path, tmp_path: Path, part: str) -> None:
    names: list[str] = []

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        stem = _first(tensors, ".qweight").removesuffix(".qweight")
        names.append(f"{stem}.{part}")
        del tensors[names[0]]

    with pytest.raises(UserError, match=r"is in no file") as caught:
        FluxTransformer2DModel.from_pretrained(_copy(flux_folder, tmp_path, drop))
    assert names[0] in str(caught.value)


@pytest.mark.parametrize("part", ["qweight", "weight_scales"])
def test_a_missing_tensor_of_transformers(text_folder: Path, tmp_path: Path, part: str) -> None:
    assert transformers.CLIPTextModel.from_pretrained(_copy(text_folder, tmp_path, lambda tensors: None))
    with pytest.raises(UserError, match=f"{part}.* is in none of its files"):
        transformers.CLIPTextModel.from_pretrained(
            _copy(text_folder, tmp_path, lambda tensors: tensors.pop(_first(tensors, f".{part}")))
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [".weight_scales", ".up", ".norm_q.weight"])
def test_values_that_are_not_finite(flux_folder: Path, tmp_path: Path, part: str, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_first(tensors, part)].view(-1)[-1] = value

    with pytest.raises(UserError, match=r"holds NaN or infinite values"):
        FluxTransformer2DModel.from_pretrained(_copy(flux_folder, tmp_path, spoil))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda kind: kind.update(rank="4"), r'layers\[0\].rank is "4"'),
        (lambda kind: kind.update(rank=10**9), r"layers\[0\].rank is 1000000000"),
        (lambda kind: kind.update(bits=5), r"layers\[0\].bits is 5"),
        (lambda kind: kind.update(smooth=1), r"layers\[0\].smooth is 1"),
        (lambda kind: kind.update(paths="abc"), r'layers\[0\].paths is "abc"'),
        (lambda kind: kind.update(paths=kind["paths"] * 2), "twice"),
        (lambda kind: kind.update(more=1), 'unknown key "more"'),
        (lambda kind: kind.pop("bias"), r"layers\[0\].bias is missing"),
        (lambda kind: kind.update(activation={}), r"activation.bits is missing"),
        (lambda kind: kind["activation"].update(bits=7), "activation"),
        (lambda kind: kind["activation"].update(shift=None), "activation.shift is null"),
    ],
    ids=range(11),
)
def test_settings_of_wrong_types(flux_folder: Path, tmp_path: Path, change: Callable[[Any], Any], why: str) -> None:
    _copy(flux_folder, tmp_path, lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"]["layers"][0])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=why):
        FluxTransformer2DModel.from_pretrained(tmp_path)
