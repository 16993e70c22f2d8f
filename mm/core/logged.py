"""What a library logs, for where it says in no other way what it left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_of(name: str, said: list[str]) -> Iterator[None]:
    """Adds to `said` what a logger warns of. Where the logger's library is set to be silent, nothing more is shown.

    Args:
        name: of the logger.
        said: gets the messages.
    """
    logger = logging.getLogger(name)
    level, passed = logger.level, logger.propagate
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    if not logger.isEnabledFor(logging.WARNING):
        logger.propagate = False
        logger.setLevel(logging.WARNING - 1)  # at WARNING itself transformers warns of more
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = passed
        logger.removeHandler(handler)
