"""safetensors files from outside: the header is checked first, then the tensors, each with an error of one line.

Design choices
- The header is read and checked here before the library maps the file: names, types, shapes, and that the tensors
  fill the file without holes. So nothing is allocated by what a header only claims.
- Types are those that the caller names. Weights of int32 or bool, which torch would convert in silence, are refused.
- Values are checked for NaN and infinity by the smallest and largest value: one pass, no copy, and both carry NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mm.core.errors import UserError, shown
from mm.core.files import open_regular
from mm.core.nouns import counted
from mm.core.safe_json import parse_object

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INTEGERS = ("I64", "I32", "I16", "I8", "U8")
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "BOOL": 1}
_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "C64": 8}
_PICKLED = "pickled, as torch.save writes, and can run code; convert it with a program that you trust"
_OTHERS = {  # how files begin that are taken for safetensors: what they are
    b"PK\x03\x04": _PICKLED,
    b"\x80\x02": _PICKLED,
    b"GGUF": "a GGUF file",
    b"version ": "a pointer of Git LFS; download the file itself (git lfs pull)",
    b"<!DOCTYP": "a web page; download the file itself",
    b"<!doctyp": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}
_CHUNK = 1 << 24  # values converted at once


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may hold at most. bytes: of all tensors. header: bytes of the header, metadata included."""

    bytes: int = 64 << 30
    header: int = 16 << 20
    tensors: int = 100_000
    dims: int = 8

    def __post_init__(self) -> None:
        if min(self.bytes, self.header, self.tensors, self.dims) < 1:
            raise ValueError(f"limits below 1: {self}")


LIMITS = Limits()
ADAPTER_LIMITS = Limits(bytes=16 << 30)


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor by its header. dtype: safetensors' name, such as "BF16". start, end: bytes in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The checked header of a file."""

    path: Path
    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The tensors of a file by name, and its metadata."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str], what: str = "safetensors file", *, limits: Limits = LIMITS) -> Header:
    """Reads and checks the header of a safetensors file; no tensor is read.

    Args:
        path: a regular file, of any suffix.
        what: what the file is, for error messages.
        limits: what it may hold at most.

    Returns:
        The tensors' types, shapes and places, and the metadata.

    Raises:
        UserError: where the file is missing or no whole safetensors file, or exceeds the limits.
    """
    where = Path(path)
    try:
        with open_regular(where, what) as file:
            size = os.fstat(file.fileno()).st_size
            raw, start = raw_header(file, where, size, limits)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or error})") from error
    metadata = _metadata(raw.pop("__metadata__", {}), where)
    if len(raw) > limits.tensors:
        raise UserError(f"{where} holds {counted(len(raw), 'tensor')}; at most {limits.tensors} are read")
    tensors = {name: _entry(name, entry, where, limits) for name, entry in raw.items()}
    _check_layout(tensors, size - start, where, limits)
    return Header(path=where, tensors=tensors, metadata=metadata)


def read_tensors(
    path: str | os.PathLike[str],
    what: str = "safetensors file",
    *,
    types: Collection[str] = FLOATS,
    finite: bool = True,
    limits: Limits = ADAPTER_LIMITS,
) -> TensorFile:
    """Reads all tensors of a file, checked.

    Args:
        path: a regular file, of any suffix.
        what: what the file is, for error messages.
        types: the types that are allowed, by safetensors' names.
        finite: whether NaN and infinity are refused.
        limits: what it may hold at most.

    Returns:
        Tensors on the CPU, in the file's types, and the metadata.

    Raises:
        UserError: as `read_header`, and where a tensor has another type, no elements, or values that are not finite.
    """
    header = read_header(path, what, limits=limits)
    check_types(header, types)
    tensors = load_tensors(header)
    if finite:
        for name, tensor in tensors.items():
            check_finite(tensor, name, header.path)
    return TensorFile(path=header.path, tensors=tensors, metadata=header.metadata)


def check_types(header: Header, types: Collection[str] = FLOATS) -> None:
    """Raises UserError where a tensor has a type other than `types`, or no elements."""
    for name, tensor in header.tensors.items():
        if tensor.dtype not in types:
            raise UserError(f"{header.path}: {shown(name)} is of type {tensor.dtype}; {' or '.join(types)} is needed")
        if not tensor.numel:
            raise UserError(f"{header.path}: {shown(name)} has shape {list(tensor.shape)}, so no values; make it again")


def load_tensors(header: Header, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file whose header was checked (all, or those named). Raises UserError where reading fails."""
    try:
        with safe_open(header.path, "pt") as file:
            return {name: file.get_tensor(name) for name in (header.tensors if names is None else names)}
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{header.path} is no safetensors file ({_line(error)})") from error


def largest(tensor: Tensor) -> float:
    """The largest absolute value, NaN or infinity where there is one; 0 for integers and tensors without values."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return 0.0
    if tensor.dtype.itemsize > 1:
        low, high = torch.aminmax(tensor.detach())
        return math.nan if low.isnan() else max(abs(low.item()), abs(high.item()))
    found = [part.float().abs().max().item() for part in tensor.detach().flatten().split(_CHUNK)]
    return math.nan if any(map(math.isnan, found)) else max(found)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; integers are."""
    return math.isfinite(largest(tensor))


def check_finite(tensor: Tensor, name: str, source: object, most: float = math.inf) -> None:
    """Raises UserError, with the source and the tensor's name, where a value is NaN, infinite or beyond `most`."""
    size = largest(tensor)
    if not math.isfinite(size):
        raise UserError(f"{source}: {shown(name)} holds NaN or infinite values; make or download the file again")
    if size > most:
        raise UserError(f"{source}: {shown(name)} holds values up to {size:.3g}; no sound weights exceed {most:.0g}")


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file.

    Args:
        tensors: by name; of any device and strides, and several may share memory, which the library refuses.
        metadata: texts by key.
    """
    ready, taken = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        ready[name] = own.clone() if place in taken else own
        taken.add(place)
    return save(ready, metadata=None if metadata is None else dict(metadata))


def ordered(data: bytes, more: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file with its metadata in alphabetical order, which safetensors leaves to chance.

    Args:
        data: the file.
        more: metadata that are added.
    """
    header, values = parts(data)
    header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), **(more or {})}.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + values


def parts(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header of a safetensors file, and the bytes of its tensors."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), memoryview(data)[8 + size :]


def stored_sizes(headers: Collection[Header]) -> tuple[int, int]:
    """How many tensors and how many values several files hold together."""
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    return len(tensors), sum(tensor.numel for tensor in tensors)


def raw_header(file: BinaryIO, source: object, size: int, limits: Limits) -> tuple[dict[str, Any], int]:
    """The header's JSON object, not yet checked, and where the tensors' bytes begin.

    Args:
        file: at its beginning.
        source: the file's name, for error messages.
        size: the file's bytes.
        limits: what it may hold at most.

    Raises:
        UserError: where the file does not begin with a header of its format.
    """
    head = file.read(8)
    length = int.from_bytes(head, "little")
    other = next((kind for start, kind in _OTHERS.items() if head.startswith(start)), "")
    if other and not 2 <= length <= min(size - 8, limits.header):  # a length may begin like another kind of file
        raise UserError(f"{source} is no safetensors file: it is {other}")
    if len(head) < 8 or length < 2 or length > size - 8:
        raise UserError(f"{source} is no safetensors file (it has no header that fits its {size} bytes)")
    if length > limits.header:
        raise UserError(f"{source} has a header of {length} bytes; at most {limits.header} are read")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise UserError(f"{source} is no safetensors file (its header is no JSON object)")
    return parse_object(text, f"{source}: its header", most=limits.header), 8 + length


def _metadata(raw: object, where: Path) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise UserError(f"{where}: __metadata__ is {shown(raw)}; an object of texts is needed")
    return raw


def _entry(name: str, raw: object, where: Path, limits: Limits) -> TensorHeader:
    """One tensor's description, checked by itself."""

    def wrong(what: str, value: object) -> UserError:
        return UserError(f"{where}: {shown(name, 120)} has {what} {shown(value)}; that is not readable")

    if not isinstance(raw, Mapping) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: {shown(name)} is {shown(raw)}; an object of dtype, shape, data_offsets is needed")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise wrong("type", dtype)
    if not _sizes(shape) or len(shape) > limits.dims:
        raise wrong("shape", shape)
    if not _sizes(offsets) or len(offsets) != 2:
        raise wrong("data_offsets", offsets)
    made = TensorHeader(dtype=dtype, shape=tuple(shape), start=offsets[0], end=offsets[1])
    if made.numel * _BYTES[dtype] != made.end - made.start:
        raise wrong(f"{made.end - made.start} bytes for type {dtype} and shape", shape)
    return made


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)


def _check_layout(tensors: Mapping[str, TensorHeader], data: int, where: Path, limits: Limits) -> None:
    """Raises UserError unless the tensors fill the file's data one after another."""
    if data > limits.bytes:
        raise UserError(f"{where} holds {data} bytes of tensors; at most {limits.bytes} are read")
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != at:
            raise UserError(
                f"{where}: {shown(name, 120)} begins at byte {tensor.start} of the data, not {at}; it is damaged"
            )
        at = tensor.end
    if at != data:
        raise UserError(f"{where} holds {data} bytes of tensors where its header describes {at}; copy it again")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
