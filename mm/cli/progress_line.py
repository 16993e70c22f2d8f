"""The line of progress on stderr, which is written over until it ends."""

from __future__ import annotations

import sys


class ProgressLine:
    """A line of progress on stderr, which is written over until it ends.

    As a context it ends the line, so that what follows, an error too, begins on a line of its own.
    """

    def __init__(self) -> None:
        self._open = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def show(self, share: float, text: str) -> None:
        """Writes a share of 0 to 1 and a text."""
        self.say(f"{share:4.0%} {text:<60}")

    def say(self, text: str) -> None:
        """Writes a text."""
        self._open = True
        print(f"\r{text:<65}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the line, where one was begun."""
        if self._open:
            print(file=sys.stderr)
        self._open = False
