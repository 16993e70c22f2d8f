"""The model that is quantized: which files it is read from, in which type it is stored, and in which it computes here.

Design choices
- Each tensor of the copy that is not quantized is stored as it was in the source; integers, scales and branches go by
  the type of most of their part. So the copy loads wherever the source did.
- The model computes in the stored type where this machine has arithmetic for it, else in float32, which holds every
  value of the 16-bit types: what is kept at 16 bits comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm.core.devices import choose, compute_type
from mm.core.errors import UserError
from mm.core.part_files import check_weights_there, only_variant, places
from mm.core.safe_tensors import read_header
from mm.layers.linear import BranchedLinear

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPES |= {"F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}  # nothing computes with them as they are


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How one part of a model is stored.

    Attributes:
        types: of its floating-point tensors, by name.
        main: of most of its numbers.
        bytes: of its files.
    """

    types: Mapping[str, torch.dtype] = field(default_factory=dict)
    main: torch.dtype = torch.float32
    bytes: int = 0


def stored_parts(folder: Path, variant: str | None = None) -> dict[str, Stored]:
    """The parts of a model folder that hold weights, by name; "" for weights in the folder itself.

    Args:
        folder: a model in diffusers' or transformers' layout.
        variant: reads files of that variant ("fp16") where a part has such.

    Raises:
        UserError: where a part's weights are in pickles only, or where no file is of the variant.
    """
    check_weights_there(folder)
    found: dict[str, Stored] = {}
    any_variant = False
    for name, place in places(folder).items():
        every = [path for path in sorted(place.glob("*.safetensors")) if path.is_file()]
        mine = [path for path in every if variant and f".{variant}" in path.name]
        any_variant = any_variant or bool(mine)
        plain = [path for path in every if path.name.count(".") == 1]
        if files := mine or plain or every:
            found[name] = _read(files)
    if variant and not any_variant:
        raise UserError(f"{folder} holds no file of variant {variant!r}; leave --variant out")
    return found


def main_type(path: Path) -> torch.dtype:
    """The type of most numbers in a safetensors file."""
    return _read([path]).main


def _read(files: list[Path]) -> Stored:
    types: dict[str, torch.dtype] = {}
    sizes: dict[torch.dtype, int] = {}
    for path in files:
        for name, row in read_header(path).tensors.items():
            kind = _TYPES.get(row.dtype)
            if kind is not None:
                types[name] = kind
                sizes[kind] = sizes.get(kind, 0) + row.numel
    main = max(sizes, key=lambda kind: sizes[kind]) if sizes else torch.float32
    return Stored(types=types, main=main, bytes=sum(path.stat().st_size for path in files))


def compute_types(parts: Mapping[str, Stored]) -> dict[str, torch.dtype]:
    """The type in which each part computes here, as diffusers' `dtype` takes it."""
    choice = choose()
    by_part = {name: compute_type(part.main, choice) for name, part in parts.items() if name}
    return {"default": torch.float32} | by_part


def load(
    where: Path | str, variant: str | None, of: Callable[..., Any], *, typed: bool
) -> tuple[Any, dict[str, Stored]]:
    """Loads a pipeline to be quantized.

    Args:
        where: a checked folder, or a hub name, whose files are fetched first.
        variant: of the files.
        of: loads a pipeline by folder and options.
        typed: whether `of` takes `dtype` and `variant`; a pipeline of ours computes in float32.

    Returns:
        The pipeline, and how its parts were stored.

    Raises:
        UserError: as `stored_parts` does.
    """
    if not isinstance(where, Path):
        from diffusers import DiffusionPipeline

        where = Path(DiffusionPipeline.download(where, variant=variant, use_safetensors=True))
    variant = variant or only_variant(where)
    parts = stored_parts(where, variant)
    return (of(where, dtype=compute_types(parts), variant=variant) if typed else of(where)), parts


def as_stored(pipe: Any, parts: Mapping[str, Stored]) -> None:
    """Gives each tensor of a pipeline the type that it had in the source, before saving."""
    for name, module in getattr(pipe, "components", {}).items():
        if isinstance(module, nn.Module) and name in parts:
            _retype(module, parts[name])


def _retype(root: nn.Module, stored: Stored) -> None:
    for path, module in root.named_modules():
        if isinstance(module, BranchedLinear) and module.bits != 16:
            nn.Module.to(module, stored.main)
            continue
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(stored.types.get(f"{path}.{name}".lstrip("."), tensor.dtype))


def folder_bytes(folder: Path) -> int:
    """Bytes of all weights in a model folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if ".parts" not in path.parts)
