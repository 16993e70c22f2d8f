"""Runs orders on an engine for visitors: progress out, pictures into files, stopped where nobody reads the answer.

Design choices
- Pictures are drawn one in a call. The engine gives the orders of all visitors their turns call by call, so each
  appears when it is done, a cancel loses at most the current one, and a small order waits for one picture of each
  other order.
- The engine's events are read in a thread of their own. A cancel, or a reader that has gone, is noticed while an order
  waits for its turn, too.
- Steps are reported a few times a second, however fast they are.
- That an order is stopping is reported here, in order with its other reports: the answer to the click on Cancel may
  arrive after the order's last report, and would replace it.
- Files carry their settings and are what the page shows and offers: Gradio re-encodes PIL pictures and would drop them.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mm.core.errors import UserError
from mm.core.png_settings import save_png
from mm.engine.engine import Engine
from mm.engine.events import CancelToken, Done, Event, Notice, Picture, Preview, Step, Words
from mm.engine.requests import Draw, Request
from mm.engine.variants import variants
from mm.ui.limits import MAX_ORDERS, STATUS_SECONDS
from mm.ui.public import settings_for_page
from mm.ui.visits import Kept, Visit

_TICK = 0.1  # seconds between two checks of the cancel token and the reader


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an order is.

    Attributes:
        count: pictures that were asked for.
        kept: finished ones.
        step, steps: of the current picture; 0 before its first step.
        preview: a rough picture of the current one.
        text: what was said so far.
        notices: warnings, each once.
        state: "waiting" for the model, "running", "stopping" after a cancel, "done" or "cancelled".
    """

    count: int
    kept: tuple[Kept, ...] = ()
    step: int = 0
    steps: int = 0
    preview: Image.Image | None = field(default=None, compare=False)
    text: str = ""
    notices: tuple[str, ...] = ()
    state: str = "waiting"

    @property
    def files(self) -> list[str]:
        """The files of the finished pictures."""
        return [kept.path for kept in self.kept]


class Orders:
    """Orders of all visitors on one engine.

    Args:
        engine: of `mm.load`.
        folder: for the pictures.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.active = 0
        self._lock = threading.Lock()

    def run(
        self, request: Request, token: CancelToken, *, reads: Callable[[], bool] = lambda: True
    ) -> Iterator[Progress]:
        """Runs a request.

        Args:
            request: what to do.
            token: stops it within a step; finished pictures are kept.
            reads: whether anybody still reads the answer; once it says no, the run is stopped.

        Yields:
            Progress, the last one with the state "done" or "cancelled".

        Raises:
            UserError: for a request that this model cannot do, and where too many orders run.
        """
        events = self._start(request, token)
        now = Progress(count=getattr(request, "count", 1))
        try:
            yield now
            yield from self._progress(events, now, token, reads)
        finally:
            token.cancel()  # no effect on a run that is over

    def _start(self, request: Request, token: CancelToken) -> queue.SimpleQueue[Event | BaseException]:
        """Begins a run in a thread; its events, and at the end `Done` or an exception."""
        begun = self._begun(request, token)
        with self._lock:
            if self.active >= MAX_ORDERS:
                raise UserError(f"{MAX_ORDERS} orders are running or waiting; try again in a minute")
            self.active += 1
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()

        def read() -> None:
            try:
                for event in begun:
                    events.put(event)
            except BaseException as error:
                events.put(error)
            finally:
                with self._lock:
                    self.active -= 1

        threading.Thread(target=read, name="mm-order", daemon=True).start()
        return events

    def _begun(self, request: Request, token: CancelToken) -> Iterator[Event]:
        """The events of a checked request; wildcards in its prompt are chosen as the command does."""
        if isinstance(request, Draw):
            return self.engine.run_all(variants(request), token, previews=True)
        return self.engine.run(request, token, previews=True)

    def _progress(
        self, events: queue.SimpleQueue[Event | BaseException], now: Progress, token: CancelToken,
        reads: Callable[[], bool],
    ) -> Iterator[Progress]:  # fmt: skip
        reported, sent = time.monotonic(), now
        while now.state not in ("done", "cancelled"):
            event = _next(events)
            if not reads():
                token.cancel()
                return
            if event is not None:
                now = self._after(now, event)
            if token.cancelled and now.state in ("waiting", "running"):
                now = replace(now, state="stopping")
            urgent = isinstance(event, Picture | Notice | Words | Done) or now.state != sent.state
            if now is not sent and (urgent or time.monotonic() - reported >= STATUS_SECONDS):
                yield now
                reported, sent = time.monotonic(), now

    def _after(self, now: Progress, event: Event | BaseException) -> Progress:
        """The progress after an event."""
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Step):
            return replace(now, state="running", step=event.step, steps=event.steps)
        if isinstance(event, Preview):
            return replace(now, preview=event.picture)
        if isinstance(event, Picture):
            settings = settings_for_page(event.settings)
            kept = Kept(self.keep(event.picture, settings), settings)
            return replace(now, state="running", kept=(*now.kept, kept), step=0, preview=None)
        if isinstance(event, Words):
            return replace(now, state="running", text=now.text + event.text)
        if isinstance(event, Notice):
            return replace(now, notices=(*now.notices, event.text))
        return replace(now, state="cancelled" if event.cancelled else "done", step=0, preview=None)

    def keep(self, picture: Image.Image, settings: dict[str, Any] | None) -> str:
        """Writes a picture into the folder under a name that cannot be guessed."""
        seed = "" if settings is None else f"-s{settings.get('seed', 0)}"
        path = self.folder / f"{secrets.token_hex(8)}{seed}.png"
        save_png(path, picture, settings)
        return str(path)


def _next(events: queue.SimpleQueue[Event | BaseException]) -> Event | BaseException | None:
    """The next event, or None after a short wait."""
    try:
        return events.get(timeout=_TICK)
    except queue.Empty:
        return None


def keep_all(visit: Visit, progress: Progress, known: int) -> int:
    """Takes the pictures from number `known` on into a visit; how many there are now."""
    for kept in progress.kept[known:]:
        visit.keep(kept.path, kept.settings)
    return len(progress.kept)
