"""The tensors and settings of a LoRA file or folder, checked before anything is computed from them.

Design choices
- safetensors only; a folder is one that peft or diffusers saved.
- Every tensor is floating point and finite. fp8 becomes bf16, which holds all of its values. Only alpha may be an
  integer, since kohya's scripts save it so.
- Settings are diffusers' `lora_adapter_metadata` inside the file, else peft's `adapter_config.json` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm.core.errors import UserError

_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_LONGEST_JSON = 4 << 20
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A file's tensors by key, its settings (peft's names, perhaps with a component's prefix), and how to call it."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    label: str


def load(source: str | Path | Mapping[str, Tensor]) -> Source:
    """Reads and checks a LoRA.

    Args:
        source: a safetensors file, a folder that peft or diffusers saved, or tensors by key.

    Raises:
        UserError: for anything else, and for tensors that are not finite floating-point numbers.
    """
    if isinstance(source, Mapping):
        tensors, label = dict(source), "the LoRA"
        settings: dict[str, Any] = {}
    else:
        path = _file(Path(source))
        tensors, settings = _read(path)
        label = str(path)
    if not tensors:
        raise UserError(f"{label} has no tensors")
    return Source(tensors={k: _checked(k, t, label) for k, t in tensors.items()}, settings=settings, label=label)


def _file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"no LoRA in the folder {path}; it should hold {' or '.join(_FILES)}")
        return found[0]
    if not path.is_file():
        raise UserError(f"no LoRA at {path}; give a .safetensors file")
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); pickled adapters are not read") from error
    if "mm_patch" in metadata:
        raise UserError(f"{path} is a patch of mm; read it with mm.adapters.patch.Patch.load")
    inside = metadata.get("lora_adapter_metadata")
    if inside is not None:
        return tensors, _settings(inside, f"the lora_adapter_metadata of {path}")
    beside = path.parent / "adapter_config.json"
    if not beside.is_file():
        return tensors, {}
    if beside.stat().st_size > _LONGEST_JSON:
        raise UserError(
            f"{beside} has {beside.stat().st_size} bytes; settings of an adapter are at most {_LONGEST_JSON}"
        )
    try:
        return tensors, _settings(beside.read_text(encoding="utf-8"), str(beside))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{beside} is no text in UTF-8 ({error})") from error


def _settings(text: str, where: str) -> dict[str, Any]:
    if len(text) > _LONGEST_JSON:
        raise UserError(f"{where} has {len(text)} characters; settings of an adapter are at most {_LONGEST_JSON}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}, not an object of settings")
    return value


def _checked(key: str, tensor: Tensor, label: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UserError(f"{label}: {key!r} is a {type(tensor).__name__}, not a tensor")
    is_alpha = key.endswith("alpha")
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() == 0:
        raise UserError(f"{label}: the tensor {key!r} is empty, its shape is {tuple(tensor.shape)}")
    if is_alpha and tensor.numel() != 1:
        raise UserError(f"{label}: {key!r} has {tensor.numel()} values, an alpha is one number")
    if is_alpha and not tensor.is_floating_point() and tensor.dtype != torch.bool and not tensor.is_complex():
        return tensor.float()
    if tensor.dtype not in _PLAIN:
        if not kind.startswith("float8"):
            raise UserError(f"{label}: the tensor {key!r} is {kind}, not floating point")
        tensor = tensor.to(torch.bfloat16)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{label}: the tensor {key!r} has NaN or infinity among its values")
    return tensor.detach()
