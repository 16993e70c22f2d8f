"""Damaged copies of a run's files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load, save


def damaged_states(file: Path) -> Iterator[tuple[str, bytes]]:
    """What was done to a safetensors file, and the bytes: cut off, another file, each kind of part lost or changed."""
    data = file.read_bytes()
    tensors = load(data)  # of the bytes: tensors of the file itself would be those of what replaces it
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    yield "empty", b""
    for share in (0.02, 0.5, 0.999):
        yield f"cut at {share}", data[: int(len(data) * share)]
    yield "JSON", b'{"step": 3}'
    yield "of nothing", save({"x": torch.zeros(1)})
    kinds = {re.sub(r"^(now|best|optimizer\.\w+|kept\|\w+)\|.*", r"\1", name): name for name in tensors}
    for name, tensor in ((name, tensors[name]) for name in kinds.values()):  # one of each kind
        yield f"without {name}", save({k: t for k, t in tensors.items() if k != name}, metadata)
        if tensor.numel() > 1:
            yield f"{name} of another shape", save(tensors | {name: tensor.flatten()[:1].clone()}, metadata)
    for key in metadata:
        yield f"without {key}", save(tensors, {k: v for k, v in metadata.items() if k != key})
        for value in ("", "[]", "{}", "null", '"x"', "[" * 3000):
            yield f"{key} = {value[:9]}", save(tensors, metadata | {key: value})
