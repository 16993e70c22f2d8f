"""The file of a patch: one safetensors file, its entries' kinds and what is known of the patch in the metadata.

Design choices
- A file is checked as a whole before a patch is made of it: every entry has its tensors, of the right shapes and types
  and with finite values, and every tensor has its entry.
- Unknown keys are refused: a setting that is read past would change what the patch does, in silence.
- A file carries a checksum of all of it, so that one that was damaged on its way is refused. Files without one (of
  earlier versions) are read as they are.

Legend: N outputs, K inputs, r rank, D width of an embedding, n rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mm.adapters.entry import DIMS, INTEGERS, PARTS, Entry
from mm.adapters.factors import factors_misfit
from mm.core.errors import UserError, shown
from mm.core.files import write_bytes
from mm.core.nouns import with_article
from mm.core.safe_json import Fields, parse_json
from mm.core.safe_tensors import FLOATS, TensorFile, read_tensors, tensor_bytes
from mm.core.tensor_seals import check_seal, sealed
from mm.layers.linear import Scope

META = "mm_patch"
CHECKSUM = "mm_checksum"
FIELDS = ("method", "base", "settings", "report", "name")
VERSION = 1


def write_patch(path: str | Path, entries: Mapping[str, Entry], fields: Mapping[str, Any]) -> None:
    """Writes one safetensors file.

    Args:
        path: the file; one that is there is replaced, as a whole.
        entries: by module path.
        fields: a value for each of `FIELDS`, JSON-ready.
    """
    tensors = {f"{p}|{k}": t for p, e in entries.items() for k, t in e.tensors.items()}
    kinds = {p: {"kind": e.kind, "scale": e.scale, "scope": e.scope} for p, e in entries.items()}
    meta = json.dumps({"version": VERSION, "entries": kinds} | dict(fields))
    write_bytes(Path(path), sealed(tensor_bytes(tensors, {META: meta}), CHECKSUM))


def read_patch(path: str | Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Reads a file that `write_patch` wrote.

    Args:
        path: the file.

    Returns:
        Its entries by module path, and a value for each of `FIELDS`.

    Raises:
        UserError: for any other file, and for one that is damaged: with the file, the key and the value.
    """
    read = read_tensors(path, "patch file", types=(*FLOATS, "I64", "I32"))
    if META not in read.metadata:
        raise UserError(f"{path} is no patch of mm; a LoRA of another program is read by mm.read_lora")
    meta = Fields(parse_json(read.metadata[META], f"{path}: {META}"), f"{path}: {META}")
    meta.only(("version", "entries", *FIELDS))
    meta.choice("version", (VERSION,))
    kinds = meta.fields("entries")
    entries = {where: _entry(where, kinds.fields(where), read) for where in kinds.raw}
    known = {f"{where}|{name}" for where, entry in entries.items() for name in entry.tensors}
    stray = next((name for name in read.tensors if name not in known), None)
    if stray is not None:
        raise UserError(f"{path}: the tensor {shown(stray)} belongs to no entry; the file is damaged")
    check_seal(path, CHECKSUM, "patch file")
    texts = {key: meta.text(key) for key in ("method", "base", "name")}
    return entries, texts | {key: meta.object(key) for key in ("settings", "report")}


def _entry(where: str, fields: Fields, read: TensorFile) -> Entry:
    """One entry with its tensors, checked."""
    fields.only(("kind", "scale", "scope"))
    kind = fields.choice("kind", tuple(PARTS))
    scope = fields.choice("scope", (None, *get_args(Scope)), None)
    tensors: dict[str, Tensor] = {}
    for name in PARTS[kind]:
        key = f"{where}|{name}"
        if key not in read.tensors:
            raise UserError(
                f"{read.path} lacks the tensor {shown(key)} of {with_article(kind)} entry; it is incomplete"
            )
        tensors[name] = read.tensors[key]
        _check_tensor(key, name, tensors[name], read.path)
    made = Entry(kind=kind, tensors=tensors, scale=fields.number("scale", -1e6, 1e6), scope=scope)
    why = _misfit(kind, tensors) or factors_misfit(made)
    if why:
        raise UserError(f"{read.path}: {shown(where)} is {with_article(kind)} entry with {why}; the file is damaged")
    return made


def _check_tensor(key: str, name: str, tensor: Tensor, path: Path) -> None:
    """Raises UserError where a tensor's type or number of dimensions is not what its part of an entry has."""
    if (name in INTEGERS) == tensor.is_floating_point():
        wanted = "int64" if name in INTEGERS else "floats"
        raise UserError(f"{path}: {shown(key)} is of type {tensor.dtype}; {wanted} needed")
    if tensor.ndim not in DIMS[name]:
        want = " or ".join(map(str, DIMS[name]))
        raise UserError(f"{path}: {shown(key)} has shape {list(tensor.shape)}; {want} dimensions are needed")


def _misfit(kind: str, tensors: Mapping[str, Tensor]) -> str:
    """Why the tensors of an entry do not belong together; empty when they do."""
    sizes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if kind == "lowrank" and sizes["down"][0] != sizes["up"][1]:
        return f"rank {sizes['down'][0]} in down {sizes['down']} and {sizes['up'][1]} in up {sizes['up']}"
    if kind == "bias" and len(sizes["delta"]) != 1:
        return f"a delta of shape {sizes['delta']}, which is no bias"
    if kind == "rotation" and sizes["rotation"][0] != sizes["rotation"][1]:
        return f"a rotation of shape {sizes['rotation']}, which is not square"
    if kind == "rows":
        ids = tensors["ids"]
        if sizes["ids"][0] != sizes["rows"][0]:
            return f"{sizes['ids'][0]} ids for {sizes['rows'][0]} rows"
        if int(ids.min()) < 0 or len(torch.unique(ids)) < len(ids):
            return "ids below 0 or given twice"
    return ""
