"""An engine as strangers may see it: its name, notes and settings without folders of the server."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from mm.engine.engine import Engine

_FOLDERS = re.compile(r"(?:~|(?<![\w.:/]))(?:/[^\s/:,;]+)*/(?=[^\s/:,;]+)|(?<!\w)[A-Za-z]:\\(?:[^\s\\:,;]+\\)*")


def for_page(engine: Engine) -> Engine:
    """A view of an engine that shares everything with it but the texts that visitors see."""
    name = last_part(engine.name)
    view = copy.copy(engine)
    view.name, view.capabilities = name, replace(engine.capabilities, model=name)
    view.notes = tuple(without_folders(note) for note in engine.notes)
    return view


def last_part(path: str) -> str:
    """The name of a file or folder; a name on the Hugging Face hub stays whole."""
    parts = PurePath(path).parts
    return path if len(parts) <= 2 and not PurePath(path).is_absolute() else PurePath(path).name


def without_folders(text: str) -> str:
    """A text in which each absolute path is its last part."""
    return _FOLDERS.sub("", text)


def settings_for_page(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a picture, with adapters by their files' names."""
    adapters = settings.get("adapters")
    if not isinstance(adapters, list):
        return dict(settings)
    named = [
        one | {"file": PurePath(str(one["file"])).name} if isinstance(one, dict) and "file" in one else one
        for one in adapters
    ]
    return {**settings, "adapters": named}
