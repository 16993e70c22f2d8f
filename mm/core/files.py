"""Results reach the disk whole or not at all: written under a temporary name, flushed, then renamed.

It does not know what it writes. A stopped job leaves at most a hidden `.NAME.PID.part` behind.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file, making its folder where that is missing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_new_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that must not be there yet. Raises FileExistsError, also where another process was quicker."""
    target = Path(path)
    whole = target.with_name(f".{target.name}.{os.getpid()}.new")
    write_bytes(whole, data)
    try:
        os.link(whole, target)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        whole.replace(target)
    finally:
        whole.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes indented JSON. A NaN raises: it is no JSON, and a result with one is none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
