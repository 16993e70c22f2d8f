"""Warnings of a run as events: Python's warnings, and what diffusers and transformers write to their logs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mm.engine.events import Notice

_LIBRARIES = ("diffusers", "transformers")
# What says nothing to a user: tokenizers count before pipelines cut, and an optional package is absent.
_DROPPED = ("Token indices sequence length is longer", "Setting `clean_caption`")
_LONGEST = 400  # characters of a line


class Notices:
    """Turns warnings into `Notice` events, each text once. Entered while the run has its turn."""

    def __init__(self, emit: Callable[[Notice], None]) -> None:
        self.emit, self.seen = emit, set[str]()

    def __enter__(self) -> None:
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = self._show
        self.lines: list[str] = []
        self.kept = library_logs(self.lines)
        self.kept.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.kept.__exit__(*error)
        self.caught.__exit__(*error)
        for text in self.lines:
            self._say(text)

    def _show(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        """In the place of `warnings.showwarning`: a user reads a warning before the picture is drawn."""
        if issubclass(category, UserWarning):
            self._say(str(message))

    def _say(self, text: str) -> None:
        if text not in self.seen:
            self.seen.add(text)
            self.emit(Notice(text=text))


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if not text.startswith(_DROPPED):
            self.lines.append(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


@contextmanager
def library_logs(lines: list[str]) -> Iterator[None]:
    """Warnings of diffusers and transformers go into `lines`, and not to stderr."""
    before = []
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        before.append((logger, list(logger.handlers), logger.propagate))
        logger.handlers, logger.propagate = [_Lines(lines)], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


def no_loading_bars() -> None:
    """Progress bars that diffusers and transformers show while they load a model stay away."""
    import diffusers
    import transformers

    for logs in (diffusers.utils.logging, transformers.utils.logging):
        logs.disable_progress_bar()
