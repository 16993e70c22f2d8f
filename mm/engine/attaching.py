"""Adapters on a loaded pipeline: patches of mm and LoRA files of other programs, by file and scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.core.nouns import counted

Adapter = tuple[str | Path, float]


def parsed(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE as file and scale; a file whose whole name is given wins.

    Raises:
        UserError: where the scale is no finite number.
    """
    file, colon, scale = text.rpartition(":")
    if not colon or Path(text).expanduser().is_file():
        return Path(text).expanduser(), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return Path(file).expanduser(), value
    if Path(file).expanduser().is_file():
        name = Path(file).name
        raise UserError(f"the scale of {name} is {scale!r}; give a number, for example {name}:0.8")
    return Path(text).expanduser(), 1.0


def attach(pipe: Any, adapter: str | Path | Adapter) -> tuple[str, str]:
    """Applies a patch or a LoRA.

    Args:
        pipe: the pipeline.
        adapter: a file, or a file and how strongly it acts.

    Returns:
        The name by which it comes off, and a line that says what was applied.

    Raises:
        UserError: where there is no such file, or it does not fit in full; nothing is applied then.
    """
    from mm.adapters.formats import read_lora
    from mm.adapters.patch import Patch
    from mm.adapters.patch_file import META
    from mm.core.safe_tensors import read_header

    path, scale = (adapter, 1.0) if isinstance(adapter, str | Path) else adapter
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no adapter file {path}")
    ours = META in read_header(file, "adapter").metadata
    patch = Patch.load(file) if ours else read_lora(file, pipe, name=_free_name(pipe, file.stem))
    layers = patch.apply(pipe, scale).layers
    return patch.name, f"{file.name}: {layers} of {counted(layers, 'layer')}, scale {scale:g}"


def attach_all(pipe: Any, adapters: Sequence[str | Path | Adapter]) -> tuple[list[str], list[str]]:
    """Applies adapters in order; names and lines as `attach` gives them. Where one fails, none is left."""
    names: list[str] = []
    lines: list[str] = []
    try:
        for adapter in adapters:
            name, line = attach(pipe, adapter)
            names.append(name)
            lines.append(line)
    except BaseException:
        detach(pipe, names)
        raise
    return names, lines


def detach(pipe: Any, names: Sequence[str]) -> None:
    """Takes adapters off, the last one first."""
    from mm.adapters.stack import stack_of

    for name in reversed(names):
        stack_of(pipe).undo(name)


def facts_of(adapters: Sequence[str | Path | Adapter]) -> dict[str, Any]:
    """The adapters as settings of a picture."""
    pairs = [(adapter, 1.0) if isinstance(adapter, str | Path) else adapter for adapter in adapters]
    return {"adapters": [{"file": str(path), "scale": float(scale)} for path, scale in pairs]} if pairs else {}


def _free_name(pipe: Any, name: str) -> str:
    """The name, with a number where an adapter of that name is there already."""
    from mm.adapters.stack import stack_of

    taken = set(stack_of(pipe).names())
    return next(made for k in range(1, 10_000) if (made := name if k == 1 else f"{name}-{k}") not in taken)
