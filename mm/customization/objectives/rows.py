"""What a denoiser reads of several prompts as the arguments of one call, put together from those of a call for each.

An argument either has a row for each picture or is the same for all. Its form does not always say which: a table of
positions may have a leading axis of one. So there are two ways of putting arguments together, and `mm` asks the
denoiser which of them gives what calls one by one give (`mm.customization.objectives.watched`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Way = Literal["rows", "shared"]
WAYS: tuple[Way, ...] = ("rows", "shared")


class _Different(Exception):
    """Values that cannot be one argument."""


def merged(conditions: Sequence[Mapping[str, Any]], way: Way) -> dict[str, Any] | None:
    """Arguments of one call; None where some differ in a way that one call does not take, as texts of other lengths do.

    Args:
        conditions: arguments of a call for one picture each.
        way: "rows" gives every tensor with a leading axis of one a row for each picture; "shared" leaves those as they
            are that all pictures have in common.
    """
    try:
        return {name: _merged([one[name] for one in conditions], way) for name in conditions[0]}
    except (_Different, KeyError):
        return None


def _merged(values: Sequence[Any], way: Way) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise _Different
    if isinstance(first, Tensor):
        return _rows(values, way)
    if isinstance(first, dict):
        return {name: _merged([value[name] for value in values], way) for name in first}
    if isinstance(first, list) and all(len(value) == 1 for value in values):  # one item a picture
        return [value[0] for value in values]
    if isinstance(first, tuple | list):
        if any(len(value) != len(first) for value in values):
            raise _Different
        return type(first)(_merged(parts, way) for parts in zip(*values, strict=True))
    if any(value is not first and value != first for value in values):
        raise _Different
    return first


def _rows(tensors: Sequence[Tensor], way: Way) -> Tensor:
    first = tensors[0]
    if any(one.shape != first.shape for one in tensors):
        raise _Different
    same = all(torch.equal(one, first) for one in tensors[1:])
    if first.ndim and len(first) == 1 and not (same and way == "shared"):
        return torch.cat(list(tensors))
    if not same:
        raise _Different
    return first
