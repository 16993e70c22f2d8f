"""Shows mkdocstrings the package as a wheel lays it out: in a checkout four of its folders lie in the root."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

sys.path.insert(0, str(Path(__file__).parent))

from lint_imports import link_package

_folder = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """mkdocs calls this once, before anything is read."""
    package = Path(_folder.name) / "mm"
    if not package.exists():
        link_package(package)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_folder.name]
    return config
