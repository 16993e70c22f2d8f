"""Makes diffusers find our pipelines by name: `DiffusionPipeline.from_pretrained(folder)` takes our folders.

diffusers looks up the class that a folder's `model_index.json` names among its own attributes. Ours are attributes of
its module that are imported on first use.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

NAMES = ("TextToImagePipeline", "ImageEditPipeline", "UnderstandingPipeline", "InterleavedPipeline")


def register() -> None:
    """Called when diffusers was imported."""
    module = sys.modules["diffusers"]
    kind: Any = type(module)
    if not getattr(kind, "_finds_mm", False):
        module.__class__ = _extended(kind)


def _extended(kind: type[ModuleType]) -> type[ModuleType]:
    class WithOurs(kind):  # type: ignore[misc, valid-type]
        """diffusers' module, with our pipelines among its attributes."""

        _finds_mm = True

        def __getattr__(self, name: str) -> Any:
            if name in NAMES:
                import mm

                return getattr(mm, name)
            return super().__getattr__(name)

    return WithOurs
