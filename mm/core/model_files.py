"""The weight files of one component of a saved model, in the layout of diffusers and transformers.

Design choices
- The files are found by the names that the libraries load, so that a stray file beside them counts for nothing.
- A component is complete where the headers of its files hold just the tensors of the module, with their shapes and
  kinds. That is known before a tensor is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mm.core.errors import UserError, shown
from mm.core.nouns import counted
from mm.core.part_files import check_no_pickle
from mm.core.safe_json import Fields, read_object
from mm.core.safe_tensors import FLOATS, TensorHeader, check_finite, read_header

STEMS = ("diffusion_pytorch_model", "model")
MAX_NUMBER = 1_000_000
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
    found = _find(folder, variant)
    return _sharded(folder, found) if found.suffix == ".json" else read_header(found).tensors


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that loading a component reads; arguments and errors as of `weight_headers`."""
    found = _find(folder, variant)
    return [folder / name for name in sorted(set(_places(found).values()))] if found.suffix == ".json" else [found]


def _find(folder: Path, variant: str | None) -> Path:
    """The index of the shards, or the single file."""
    end = f".{variant}" if variant else ""
    for stem in STEMS:
        for path in (folder / f"{stem}.safetensors.index{end}.json", folder / f"{stem}{end}.safetensors"):
            if path.exists():
                return path
    if variant:  # diffusers takes the plain files of a component that has none of the variant
        return _find(folder, None)
    check_no_pickle(folder)
    names = f"{STEMS[0]}.safetensors or {STEMS[1]}.safetensors"
    raise UserError(f"{folder} cannot be loaded: it holds no file named {names}; copy it again")


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
            f"{folder} holds {len(set(own) & set(stored))} of {counted(len(own), 'tensor')} of this "
            "model; missing or unknown: "
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


def check_loaded(module: nn.Module, source: Any, most: float = math.inf) -> None:
    """Raises UserError where a loaded module has a tensor without data, of a wrong type, or with NaN or infinity.

    A tensor that is still on the meta device was in no file: an operator would read memory that nobody wrote. Modules
    that accelerate offloads keep theirs elsewhere and are not checked. `most`: the largest value of sound weights.
    """
    for path, part in module.named_modules():
        if getattr(part, "_hf_hook", None) is not None:
            continue
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        unsaved = part._non_persistent_buffers_set  # masks among them hold infinities
        for name, tensor in own:
            full = f"{path}.{name}".strip(".")
            if tensor.is_meta:
                raise UserError(f"{source}: {full} is in no file; copy or save the model again")
            weight = isinstance(tensor, nn.Parameter) and not hasattr(part, "qweight")  # packed integers
            if weight and not (tensor.is_floating_point() or tensor.is_complex()):
                raise UserError(f"{source}: {full} is of type {tensor.dtype}; a floating type is needed")
            if name not in unsaved:
                check_finite(tensor, full, source, most)


def largest_size(stored: Mapping[str, TensorHeader]) -> int:
    """The largest size of any tensor, and at least 1024: no setting of ours that is a size is larger."""
    return max([1024, *(size for header in stored.values() for size in header.shape)])


def check_sizes(config: Mapping[str, Any], most: int, source: object) -> None:
    """Raises UserError where a setting is a whole number above `most`, a list of more values, or a huge number."""
    for key, value in config.items():
        parts = [value]
        while parts:
            part = parts.pop()
            if isinstance(part, list):
                if len(part) > most:
                    raise UserError(
                        f"{source}: {_plain(key)} has {counted(len(part), 'value')}, more than a model of this size has"
                    )
                parts += part
            elif isinstance(part, float) and abs(part) > MAX_NUMBER:
                raise UserError(f"{source}: {_plain(key)} is {part}; a number up to {MAX_NUMBER} is needed")
            elif isinstance(part, int) and abs(part) > most:
                raise UserError(f"{source}: {_plain(key)} is {part}, more than a model of this size has")


def _places(index: Path) -> dict[str, str]:
    """The shard of each tensor, by the index."""
    places = Fields(read_object(index), str(index)).object("weight_map")
    if not places or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in places.values()):
        raise UserError(f"{index}: weight_map does not name .safetensors files of its folder; copy it again")
    return places


def _sharded(folder: Path, index: Path) -> dict[str, TensorHeader]:
    places = _places(index)
    found: dict[str, TensorHeader] = {}
    for name in sorted(set(places.values())):
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
