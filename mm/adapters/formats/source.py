"""The tensors and settings of a LoRA file or folder, checked before anything is computed from them.

Design choices
- safetensors only; a folder is one that peft or diffusers saved.
- Every tensor is floating point and finite. fp8 becomes bf16, which holds all of its values. Only alpha may be an
  integer, since kohya's scripts save it so.
- Settings are diffusers' `lora_adapter_metadata` inside the file, else peft's `adapter_config.json` beside it,
  which belongs to a file that has the name or the layout of peft's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.adapters.formats.layouts import foreign
from mm.adapters.formats.words import unpacked, word_of
from mm.core.adapter_files import PEFT_FILE, adapter_file, adapter_name
from mm.core.errors import UserError, shown
from mm.core.nouns import with_article
from mm.core.safe_json import parse_object, read_object
from mm.core.safe_tensors import FLOATS, INTEGERS, read_tensors

_LONGEST_JSON = 4 << 20
_LONGEST_NAME = 200
_OF_PEFT = "base_model.model."  # names in peft's files begin so
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A file's tensors by key, its settings (peft's names, perhaps with a component's prefix), and how messages call it
    (`label`). `name`: what a patch of it is called where the caller does not say so. `word`: what a textual inversion
    in it is called where it does not say so; empty where it has no name. `base`: the hash of the model that mm made it
    for, and `trigger` what its subject is called; empty where it does not say so."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    label: str
    name: str = "lora"
    word: str = ""
    base: str = ""
    trigger: str = ""


def load(source: str | Path | Mapping[str, Tensor]) -> Source:
    """Reads and checks a LoRA.

    Args:
        source: a safetensors file, a folder that peft or diffusers saved, or tensors by key.

    Raises:
        UserError: for anything else, and for tensors that are not finite floating-point numbers.
    """
    settings: dict[str, Any] = {}
    said: Mapping[str, str] = {}
    word, name = "", "lora"
    if isinstance(source, Mapping):
        named = source.get("name")
        word = named if isinstance(named, str) else ""
        tensors, label = unpacked(source), "the LoRA"
    else:
        path = adapter_file(source)
        word, name = word_of(path), adapter_name(path)
        tensors, settings, said = _read(path)
        label = str(path)
    if not tensors:
        raise UserError(f"{label} has no tensors")
    return Source(
        tensors={k: _checked(k, t, label) for k, t in tensors.items()}, settings=settings, label=label, name=name,
        word=word, base=said.get("mm_base", ""), trigger=said.get("modelspec.trigger_phrase", "")[:_LONGEST_NAME],
    )  # fmt: skip


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Tensors, settings of peft, and metadata."""
    read = read_tensors(
        path, "LoRA", types=(*FLOATS, *INTEGERS, "BOOL"), finite=False
    )  # `_checked` says it of each by name
    if "mm_patch" in read.metadata:
        raise UserError(f"{path} is a patch of mm; read it with mm.adapters.patch.Patch.load")
    inside = read.metadata.get("lora_adapter_metadata")
    if inside is not None:
        settings = parse_object(inside, f"{path}: lora_adapter_metadata", most=_LONGEST_JSON)
        return read.tensors, settings, read.metadata
    beside = path.parent / "adapter_config.json"
    # Beside other programs' files they are another adapter's, which would give these a wrong strength.
    mine = beside.exists() and (path.name == PEFT_FILE or any(key.startswith(_OF_PEFT) for key in read.tensors))
    if path.name == PEFT_FILE and not mine and not any(key.endswith("alpha") for key in read.tensors):
        warnings.warn(
            f"{path} has no adapter_config.json beside it, which says how strongly it acts; it acts in full",
            stacklevel=4,
        )
    return read.tensors, read_object(beside, "adapter config", most=_LONGEST_JSON) if mine else {}, read.metadata


def _checked(key: str, tensor: Tensor, label: str) -> Tensor:
    name = f"{label}: the tensor {shown(key)}"
    if not isinstance(key, str) or not isinstance(tensor, Tensor):
        raise UserError(f"{label}: {shown(key)} is {with_article(type(tensor).__name__)}; give tensors by key")
    if tensor.numel() == 0:
        raise UserError(f"{name} is empty, its shape is {tuple(tensor.shape)}")
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if key.endswith("alpha"):
        if tensor.numel() != 1:
            raise UserError(f"{name} has {tensor.numel()} values; an alpha is one number")
        tensor = tensor.float() if whole else tensor
    if tensor.dtype not in _PLAIN:
        kind = str(tensor.dtype).removeprefix("torch.")
        if not kind.startswith("float8"):
            what = foreign(key)
            raise UserError(
                f"{name} is {f'of {what}, which mm does not apply' if what else f'{kind}, not floating point'}"
            )
        tensor = tensor.to(torch.bfloat16)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{name} has NaN or infinity among its values")
    return tensor.detach()
