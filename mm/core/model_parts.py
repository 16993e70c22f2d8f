"""Copies of model folders: saving a pipeline, and parts of its source that a copy still lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.core.files import write_bytes

INDEX = "model_index.json"


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Saves a pipeline of diffusers. Raises UserError where the disk is full or cannot be written."""
    try:
        pipe.save_pretrained(folder)
    except (OSError, UserError):
        raise
    except Exception as error:  # libraries in Rust name the system's errors in words alone
        if "os error" not in str(error):
            raise
        raise UserError(f"{folder} cannot be written ({error}); free some space, and run the command again") from error


def bring_the_rest(source: Path, copy: Path) -> None:
    """Copies components that only other pipelines of a folder use, so that a copy does all that its source does.

    Args:
        source: a folder of diffusers' layout; any other is passed over.
        copy: a folder that one pipeline of the source has saved; what is there stays.
    """
    if not (source / INDEX).is_file():
        return
    before, after = (json.loads((folder / INDEX).read_text(encoding="utf-8")) for folder in (source, copy))
    missing = {k: x for k, x in before.items() if k not in after and isinstance(x, list) and (source / k).is_dir()}
    for name in missing:
        shutil.copytree(source / name, copy / name)
    write_bytes(copy / INDEX, (json.dumps(after | missing, indent=2) + "\n").encode())
