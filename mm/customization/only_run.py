"""One run at a time in a folder of work: two would write each other's state.

Design choices
- The lock is the system's own (flock) on a file in the folder, so that it ends with the process, however that ends.
- A system without such locks, and a file system that refuses them, run without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mm.core.errors import UserError

LOCK = ".running"


@contextmanager
def only_run(work: Path | None) -> Iterator[None]:
    """Within the context no other run works in the folder; None needs none.

    Raises:
        UserError: where another run works there.
    """
    if work is None:
        yield
        return
    made = [folder for folder in (work, *work.absolute().parents) if not folder.exists()]
    work.mkdir(parents=True, exist_ok=True)
    file = _locked(work / LOCK, work)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                (work / LOCK).unlink()
            file.close()
        for folder in made:  # of a run that was refused: nothing is left of it
            with suppress(OSError):
                folder.rmdir()


def _locked(path: Path, work: Path) -> BinaryIO | None:
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(
                f"another run works in {work}; wait until it ends, or give this one another folder (--work)"
            ) from error
        except OSError:
            file.close()
            return None
        # The run before may have taken the file away between our two calls.
        if _same(path, file):
            return file
        file.close()


def _same(path: Path, file: BinaryIO) -> bool:
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False
