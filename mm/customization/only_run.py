"""One run at a time in a folder of work: two would write each other's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mm.core.locks import locked

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
    refusal = f"another run works in {work}; wait until it ends, or give this one another folder (--work)"
    try:
        with locked(work / LOCK, refusal=refusal):
            yield
    finally:
        for folder in made:  # of a run that was refused: nothing is left of it
            with suppress(OSError):
                folder.rmdir()
