"""The weight files of one component of a saved model, in the layout of diffusers and transformers.

Design choices
- The files are found by the names that the libraries load, so that a stray file beside them counts for nothing.
- A component is complete where the headers of its files hold just the tensors of the module, with their shapes and
  kinds. That is known before a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mm.core.errors import UserError, shown
from mm.core.safe_json import Fields, read_object
from mm.core.safe_tensors import FLOATS, TensorHeader, check_finite, read_header

STEMS = ("diffusion_pytorch_model", "model")
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors")


def weight_headers(folder: Path, variant: str | None = None) -> dict[str, TensorHeader]:
    """The tensors that loading a component reads, by name.

    Args:
        folder: the component's folder.
        variant: as for `from_pretrained`, for example "fp16".

    Returns:
        Header by tensor name, of one file or of all shards that the index names.

    Raises:
        UserError: where there is no such file, one is damaged, or index and shards disagree.
    """
    end = f".{variant}" if variant else ""
    for stem in STEMS:
        index, single = folder / f"{stem}.safetensors.index{end}.json", folder / f"{stem}{end}.safetensors"
        if index.exists():
            return _sharded(folder, index)
        if single.exists():
            return read_header(single).tensors
    if variant:  # diffusers takes the plain files of a component that has none of the variant
        return weight_headers(folder)
    raise UserError(f"{folder} holds no file named {STEMS[0]}.safetensors or {STEMS[1]}.safetensors; copy it again")


def check_tensors(module: nn.Module, stored: Mapping[str, TensorHeader], folder: Path) -> None:
    """Raises UserError unless stored tensors are just those of a module, with their shapes and kinds.

    Args:
        module: the built module; its tensors may be on the meta device.
        stored: header by tensor name.
        folder: where they lie, for the error message.
    """
    own = module.state_dict()
    wrong = [*sorted(set(own) - set(stored)), *sorted(set(stored) - set(own))]
    if wrong:
        raise UserError(
            f"{folder} holds {len(set(own) & set(stored))} of {len(own)} tensors of this model; missing or unknown: "
            f"{', '.join(_plain(name) for name in wrong[:3])}; copy or save the model again"
        )
    for name, tensor in own.items():
        header = stored[name]
        if header.shape != tuple(tensor.shape):
            raise UserError(
                f"{folder}: {name} has shape {list(header.shape)}, not {list(tensor.shape)} as in config.json"
            )
        if (header.dtype in FLOATS) != tensor.is_floating_point():
            want = "a floating type" if tensor.is_floating_point() else "an integer type"
            raise UserError(f"{folder}: {name} is of type {header.dtype}; {want} is needed")


def check_loaded(module: nn.Module, source: Any) -> None:
    """Raises UserError where a loaded module has a tensor without data, of a wrong type, or with NaN or infinity.

    A tensor that is still on the meta device was in no file: an operator would read memory that nobody wrote. Modules
    that accelerate offloads keep theirs elsewhere and are not checked.
    """
    for path, part in module.named_modules():
        if getattr(part, "_hf_hook", None) is not None:
            continue
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            full = f"{path}.{name}".strip(".")
            if tensor.is_meta:
                raise UserError(f"{source}: {full} is in no file; copy or save the model again")
            weight = isinstance(tensor, nn.Parameter) and not hasattr(part, "qweight")
            if weight and not (tensor.is_floating_point() or tensor.is_complex()):
                raise UserError(f"{source}: {full} is of type {tensor.dtype}; a floating type is needed")
            check_finite(tensor, full, source)


def check_sizes(config: Mapping[str, Any], stored: Mapping[str, TensorHeader], source: Path) -> None:
    """Raises UserError where a setting is larger than any size in the weights, which then cannot be a size of theirs.

    For classes whose settings are all sizes of tensors, or counts below 1024.
    """
    most = max([1024, *(size for header in stored.values() for size in header.shape)])
    for key, value in config.items():
        parts = [value]
        while parts:
            part = parts.pop()
            if isinstance(part, list):
                if len(part) > most:
                    raise UserError(f"{source}: {_plain(key)} has {len(part)} values; the weights hold no such size")
                parts += part
            elif isinstance(part, int) and abs(part) > most:
                raise UserError(f"{source}: {_plain(key)} is {part}; the weights hold no such size")


def _sharded(folder: Path, index: Path) -> dict[str, TensorHeader]:
    places = Fields(read_object(index), str(index)).object("weight_map")
    names = set(places.values()) if all(isinstance(name, str) for name in places.values()) else {""}
    if not names or not all(_SHARD.fullmatch(name) for name in names):
        raise UserError(f"{index}: weight_map does not name .safetensors files of its folder; copy it again")
    found: dict[str, TensorHeader] = {}
    for name in sorted(names):
        tensors = read_header(folder / name).tensors
        wrong = [key for key in tensors if places.get(key) != name]
        if wrong:
            raise UserError(f"{folder / name} holds {shown(wrong[0])}, which {index.name} does not place there")
        found |= tensors
    missing = [key for key in places if key not in found]
    if missing:
        raise UserError(f"{folder} lacks {shown(missing[0])}, which {index.name} places in {shown(places[missing[0]])}")
    return found


def _plain(name: str) -> str:
    """A name for a message: one line, without quotation marks."""
    return shown(name, 120).strip('"')
