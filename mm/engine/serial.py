"""A lock that is taken in the order in which it was asked for, so that a large order cannot starve a small one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from mm.engine.events import CancelToken, RunCancelledError

_TICK = 0.05  # seconds between two checks of a token


class FairLock:
    """First come, first served. `with lock:` waits; `with lock.turn(token):` may be cancelled meanwhile."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    def __enter__(self) -> FairLock:
        self._take(CancelToken())
        return self

    @contextmanager
    def turn(self, cancel: CancelToken) -> Iterator[None]:
        """Holds the lock.

        Args:
            cancel: ends the wait.

        Raises:
            RunCancelledError: where `cancel` was called before the lock was free.
        """
        self._take(cancel)
        try:
            yield
        finally:
            self.__exit__(None, None, None)

    def _take(self, cancel: CancelToken) -> None:
        with self._mutex:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        try:
            while not turn.wait(_TICK):
                if cancel.cancelled:
                    raise RunCancelledError
        except BaseException:  # interrupted or cancelled: leave the queue, or hand on a turn that came just now
            with self._mutex:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    raise
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()  # taken on behalf of the next
            else:
                self._taken = False
