"""The file of a patch: one safetensors file, its entries' kinds and what is known of the patch in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mm.adapters.entry import PARTS, Entry
from mm.core.errors import UserError
from mm.core.files import write_bytes

META = "mm_patch"
FIELDS = ("method", "base", "settings", "report", "name")


def write_patch(path: str | Path, entries: Mapping[str, Entry], fields: Mapping[str, Any]) -> None:
    """Writes one safetensors file.

    Args:
        path: the file; replaced as a whole.
        entries: by module path.
        fields: a value for each of `FIELDS`, JSON-ready.
    """
    tensors = {f"{p}|{k}": t.contiguous().cpu() for p, e in entries.items() for k, t in e.tensors.items()}
    kinds = {p: {"kind": e.kind, "scale": e.scale, "scope": e.scope} for p, e in entries.items()}
    meta = {"version": 1, "entries": kinds} | dict(fields)
    write_bytes(Path(path), save(tensors, metadata={META: json.dumps(meta)}))


def read_patch(path: str | Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Reads a file that `write_patch` wrote.

    Args:
        path: the file.

    Returns:
        Its entries by module path, and a value for each of `FIELDS`.

    Raises:
        UserError: for any other file.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            text = (file.metadata() or {}).get(META)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file ({error})") from error
    if text is None:
        raise UserError(f"{path} is no patch of mm; a LoRA of another program is read by mm.read_lora")
    meta = json.loads(text)
    entries = {
        p: Entry(
            kind=e["kind"],
            scale=e["scale"],
            scope=e["scope"],
            tensors={k: tensors[f"{p}|{k}"] for k in PARTS[e["kind"]]},
        )
        for p, e in meta["entries"].items()
    }
    return entries, {k: meta[k] for k in FIELDS}
