"""The line of progress on stderr, which is written over until it ends."""

from __future__ import annotations

import sys


class ProgressLine:
    """One line: a share and a text."""

    open = False

    def show(self, share: float, text: str) -> None:
        """Writes it."""
        self.open = True
        print(f"\r{share:4.0%} {text:<60}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Lets what follows, an error too, begin on a line of its own."""
        if self.open:
            print(file=sys.stderr)
        self.open = False
