"""Parts of a model folder that a copy of it still lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mm.core.files import write_bytes

INDEX = "model_index.json"


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
