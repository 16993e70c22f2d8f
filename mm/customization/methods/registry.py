"""The methods by name."""

from __future__ import annotations

import importlib

from mm.core.errors import UserError
from mm.customization.methods.protocol import Method

METHODS: dict[str, str] = {
    "dreambooth": "dreambooth:DreamBooth",
}
DEFAULT = "dreambooth"


def method_of(name: str) -> Method:
    """The method of a name; "auto" is the one that measured best (docs/customization.md). Raises UserError."""
    wanted = DEFAULT if name == "auto" else name
    if wanted not in METHODS:
        raise UserError(f"no method {name!r}; there are auto, {', '.join(METHODS)}")
    module, _, kind = METHODS[wanted].partition(":")
    made: Method = getattr(importlib.import_module(f"mm.customization.methods.{module}"), kind)()
    return made
