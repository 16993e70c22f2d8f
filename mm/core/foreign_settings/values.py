"""Values of other programs' settings, checked by type and range."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

_WHOLE = re.compile(r"-?[0-9]{1,20}")
_DECIMAL = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,3})?")


def whole(value: object) -> int | None:
    """An integer, also from text or from a float without a fraction; None for anything else."""
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64 else None


def number(value: object) -> int | float | None:
    """A finite number, also from text; None for anything else."""
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if _WHOLE.fullmatch(text) else float(text) if _DECIMAL.fullmatch(text) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def text(value: object) -> str | None:
    """Text; None for anything else."""
    return value if isinstance(value, str) else None


def named_text(value: object) -> str | None:
    """Text that is not empty; None for anything else."""
    return value if isinstance(value, str) and value else None


def size(value: object) -> int | None:
    """A side of a picture in pixels; None for anything else."""
    side = whole(value)
    return side if side is not None and 1 <= side <= 1_000_000 else None


READERS: dict[str, Callable[[object], Any]] = {
    "prompt": text,
    "negative_prompt": text,
    "seed": whole,
    "steps": whole,
    "guidance": number,
    "sampler": named_text,
    "scheduler": named_text,
    "width": size,
    "height": size,
    "model": named_text,
}


def collect(found: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Settings from a program's own keys.

    Args:
        found: values by the program's keys.
        names: mm's name by the program's key.

    Returns:
        The values that have mm's name and a sound type; all others unchanged under "other", where there are any.
    """
    settings: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for key, value in found.items():
        name = names.get(key)
        made = None if name is None else READERS[name](value)
        if name is None or made is None or name in settings:
            other[key] = value
        else:
            settings[name] = made
    return settings | ({"other": other} if other else {})
