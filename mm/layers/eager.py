"""Runs compiled models without their graphs, so that hooks on their layers are called.

Design choices
- torch.compile does not check for hooks that came after it, and a graph that was compiled without them goes past them
  in silence. What watches layers therefore runs eagerly; the graphs are kept for later calls.
- torch has one stance for the whole process. The first who enters sets it and the last who leaves resets it, in
  whichever thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Stance:
    """How many are inside, and what the first of them found."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.changed: Any = None  # torch's own context, which resets the stance

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.changed = torch.compiler.set_stance("force_eager")
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.changed.__exit__(None, None, None)


_STANCE = _Stance()


@contextmanager
def eagerly() -> Iterator[None]:
    """Within the context, and in functions that it decorates, nothing runs as a compiled graph."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        yield
        return
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()
