"""`Run`: a request that is being worked on, read as an iterator or with a callback.

Design choices
- Read as an iterator, a worker thread draws while the caller reads: a page can serve others meanwhile.
- `each` works in the caller's own thread.
- The caller's OpenMP threads are ended before a worker thread begins (`mm.core.threads`): two teams of threads together
  made a picture of the small model take 1.5 times as long in a thread of its own (`benchmarks/engine_overhead.py`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator

from mm.core.threads import release_team
from mm.engine.events import CancelToken, Event

Emit = Callable[[Event], None]


class Run(Iterator[Event]):
    """Events of a request, in order. Nothing is done before the first is read.

    Args:
        work: does it, and emits the events.
        token: stops it within a step.
    """

    def __init__(self, work: Callable[[Emit], None], token: CancelToken) -> None:
        self._work, self._token = work, token
        self._events = self._threaded()

    def __next__(self) -> Event:
        return next(self._events)

    def each(self, on_event: Callable[[Event], None]) -> None:
        """Does the work in this thread, and calls `on_event` with each event as it comes."""
        self._work(on_event)

    def close(self) -> None:
        """Cancels what is still being drawn, and waits for its end."""
        self._events.close()

    def _threaded(self) -> Generator[Event, None, None]:
        """Works in a thread and yields what it emits; its exception is raised here."""
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

        def body() -> None:
            try:
                self._work(events.put)
            except BaseException as error:
                events.put(error)
            finally:
                events.put(None)

        release_team()
        thread = threading.Thread(target=body, name="mm-run", daemon=True)
        thread.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self._token.cancel() if thread.is_alive() else None
            thread.join()
