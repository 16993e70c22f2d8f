"""Patches, the stack of what is applied to a model, and the adapter files of other programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm.core.lazy import loader

if TYPE_CHECKING:
    from mm.adapters.patch import Patch
    from mm.adapters.stack import stack_of

__all__ = ["Patch", "stack_of"]
__getattr__ = loader("mm.adapters", {"Patch": "patch", "stack_of": "stack"})
