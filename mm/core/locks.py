"""One process at a time at a place of the file system.

Design choices
- The lock is the system's own (flock), so that it ends with the process, however that ends.
- A system without such locks, and a file system that refuses them, run without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mm.core.errors import UserError


@contextmanager
def locked(path: Path, *, refusal: str = "", waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Within the context no other process is in a context of the same path.

    Args:
        path: of the file that is locked. It is made, and removed at the end.
        refusal: the error where another process is there, unless `waiting` is given.
        waiting: called once where another process is there; then this one waits for its end.

    Raises:
        UserError: where another process is there, and none waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _take(path, refusal, waiting)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()
            file.close()


def _take(path: Path, refusal: str, waiting: Callable[[], object] | None) -> BinaryIO | None:
    """The open file with the lock; None where there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    said = False
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if waiting is None:
                file.close()
                raise UserError(refusal) from error
            if not said:
                waiting()
                said = True
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            file.close()
            return None
        if _same(path, file):  # the process before may have removed it between our two calls
            return file
        file.close()


def _same(path: Path, file: BinaryIO) -> bool:
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False
