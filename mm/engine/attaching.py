"""Adapters on a loaded pipeline: patches of mm and LoRA files of other programs, by file and scale.

Files of one name, or patches whose own name is taken, are numbered, so that all of them act.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.adapter_files import adapter_file, adapter_label, adapter_name
from mm.core.checks import shown
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.core.paths import expanded

if TYPE_CHECKING:
    from mm.adapters.patch import Patch

Adapter = tuple[str | Path, float]


def parsed(text: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE as file and scale; a file or folder whose whole name is given wins.

    Raises:
        UserError: where the scale is no finite number.
    """
    file, colon, scale = text.rpartition(":")
    if not colon or expanded(text).exists():
        return expanded(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return expanded(file), value
    if expanded(file).exists():
        name = Path(file).name
        raise UserError(f"the scale of {name} is {scale!r}; give a number, for example {name}:0.8")
    return expanded(text), 1.0


def listed(adapters: str | Path | Adapter | Sequence[str | Path | Adapter]) -> list[str | Path | Adapter]:
    """Adapters as a list; a file or a (file, scale) alone is a list of one.

    Raises:
        UserError: for anything else.
    """
    if isinstance(adapters, str | Path) or _is_pair(adapters):
        return [adapters]  # type: ignore[list-item]
    if isinstance(adapters, Mapping | Set):  # a list of its keys would lose the scales, and a set has no order
        raise UserError(f"the adapters are {shown(adapters)}; give a list of files, or of (file, scale)")
    found = list(adapters) if isinstance(adapters, Iterable) else [adapters]
    for one in found:
        if not isinstance(one, str | Path) and not _is_pair(one):
            raise UserError(f"an adapter is {shown(one)}; give a file, or (file, scale)")
    return found  # type: ignore[return-value]


def _is_pair(one: object) -> bool:
    """Whether it is a file and a scale."""
    return (
        isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str | Path)
        and isinstance(one[1], int | float)
    )  # fmt: skip


def attach(pipe: Any, adapter: str | Path | Adapter) -> tuple[str, str]:
    """Applies a patch or a LoRA.

    Args:
        pipe: the pipeline.
        adapter: a file or a folder that peft or diffusers saved, or one of them and how strongly it acts.

    Returns:
        The name by which it comes off, and a line that says what was applied.

    Raises:
        UserError: where there is no such file, or it does not fit in full, with the file; nothing is applied then.
    """
    path, scale = (adapter, 1.0) if isinstance(adapter, str | Path) else adapter
    file = adapter_file(path)
    try:
        patch, layers = _applied(pipe, file, scale)
    except UserError as error:
        said = str(error)
        raise UserError(said if str(file) in said else f"{file}: {said}") from error
    words = "".join(f", word {word}" for word in _words(patch.settings))
    return patch.name, f"{adapter_label(file)}: {layers} of {counted(layers, 'layer')}, scale {scale:g}{words}"


def _words(settings: Mapping[str, Any]) -> list[str]:
    """The words that a patch brings, as prompts have them: one of several rows also has tokens WORD_1, WORD_2."""
    tokens = dict.fromkeys(str(item["token"]) for item in settings.get("tokens", ()))
    stems = {token: token.rpartition("_") for token in tokens}
    return [token for token, (stem, _, end) in stems.items() if not (stem in tokens and end.isdecimal())]


def _applied(pipe: Any, file: Path, scale: float) -> tuple[Patch, int]:
    """Applies what a file holds; and how many layers that changes."""
    from mm.adapters.formats import read_lora
    from mm.adapters.patch import Patch
    from mm.adapters.patch_file import META
    from mm.adapters.stack import stack_of
    from mm.core.safe_tensors import read_header

    if META in read_header(file, "adapter").metadata:
        patch = Patch.load(file)
        patch = dataclasses.replace(patch, name=free_name(stack_of(pipe).names(), patch.name))
    else:
        patch = read_lora(file, pipe, name=free_name(stack_of(pipe).names(), adapter_name(file)))
    return patch, patch.apply(pipe, scale).layers


def attach_all(pipe: Any, adapters: Sequence[str | Path | Adapter]) -> tuple[list[str], list[str]]:
    """Applies adapters in order.

    Args:
        pipe: the pipeline.
        adapters: files or folders as `attach` takes them, each alone or with its scale.

    Returns:
        Names and lines as `attach` gives them.

    Raises:
        UserError: as `attach`, and for a file that is given twice; none is left then.
    """
    _check_twice([adapter if isinstance(adapter, str | Path) else adapter[0] for adapter in adapters])
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


def _check_twice(files: Sequence[str | Path]) -> None:
    """Raises UserError where two of the files are one."""
    seen: dict[Path, str | Path] = {}
    for file in files:
        where = adapter_file(file).resolve()
        if where in seen:
            raise UserError(f"the adapter {file} is given twice; give it once, with a scale ({file}:2) to act more")
        seen[where] = file


def detach(pipe: Any, names: Sequence[str]) -> None:
    """Takes adapters off, the last one first."""
    from mm.adapters.stack import stack_of

    for name in reversed(names):
        stack_of(pipe).undo(name)


def facts_of(adapters: Sequence[str | Path | Adapter]) -> dict[str, Any]:
    """The adapters as settings of a picture."""
    pairs = [(adapter, 1.0) if isinstance(adapter, str | Path) else adapter for adapter in adapters]
    return {"adapters": [{"file": str(path), "scale": float(scale)} for path, scale in pairs]} if pairs else {}


def free_name(taken: Collection[str], name: str) -> str:
    """The name, with a number where an adapter of that name is there already."""
    return next(made for k in range(1, 10_000) if (made := name if k == 1 else f"{name}-{k}") not in taken)
