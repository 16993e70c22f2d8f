"""A patch that acts for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mm.adapters.patch import Patch
from mm.adapters.stack import stack_of


@contextmanager
def acting(target: Any, patch: Patch | None, scale: float | None = 1.0) -> Iterator[None]:
    """Within the context a patch acts; afterwards the model is as it was.

    A patch that is on the model already stays in its place and gets its scale back.

    Args:
        target: a module or pipeline.
        patch: None changes nothing.
        scale: how strongly it acts; None is without it.

    Raises:
        UserError: where it does not fit, or another patch of its name is on the model.
    """
    item = None if patch is None else next((one for one in stack_of(target).list() if one.name == patch.name), None)
    if patch is None or (item is None and scale is None):
        yield
        return
    if item is None:
        patch.apply(target, 1.0 if scale is None else scale)
    else:
        patch.scale(target, 0.0 if scale is None else scale)
    try:
        yield
    finally:
        if item is None:
            patch.undo(target)
        else:
            patch.scale(target, item.scale)
