"""Visits: the pictures, the running order and the conversation of each visitor, under a random name.

Design choices
- A page keeps the name of its visit in the browser, so that a reload finds its pictures and its conversation again.
  Whoever knows the name sees the pictures; it has 128 random bits.
- Everything is bounded: visits, their age, pictures of a visit. What goes takes its files along.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.engine.events import CancelToken
from mm.ui.limits import MAX_HISTORY, MAX_MESSAGES, MAX_VISITS, VISIT_SECONDS

Message = dict[str, Any]  # {"role": "user" or "assistant", "text": ..., "file": path or None}


class BusyError(UserError):
    """A visit has one order or one turn at a time."""


@dataclass(frozen=True)
class Kept:
    """A picture's file and the settings that it was drawn with."""

    path: str
    settings: dict[str, Any]


class Visit:
    """One visitor: pictures with their settings, what runs for them, and their conversation.

    Attributes:
        name: random; the page sends it with each request.
        history: all pictures, newest first, at most MAX_HISTORY.
        latest: those of the last order, oldest first.
        chosen: settings of the selected picture.
        messages: of the conversation, as they are shown.
        conversation: what the model keeps of it; None before the first turn.
        seed: of the conversation's pictures.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.history: list[Kept] = []
        self.latest: list[Kept] = []
        self.chosen: dict[str, Any] | None = None
        self.messages: list[Message] = []
        self.conversation: Any = None
        self.seed = 0
        self.used = time.monotonic()
        self._order: CancelToken | None = None
        self._lock = threading.Lock()

    def begin(self) -> CancelToken:
        """A token for a new order.

        Raises:
            BusyError: while another order of this visit runs.
        """
        with self._lock:
            if self._order is not None:
                raise BusyError("the last order is still running; wait for it, or press Cancel")
            self._order = CancelToken()
            return self._order

    def end(self, token: CancelToken) -> None:
        """The order of `token` is over."""
        with self._lock:
            if self._order is token:
                self._order = None

    def cancel(self) -> bool:
        """Stops what runs; whether anything did."""
        with self._lock:
            if self._order is None:
                return False
            self._order.cancel()
            return True

    @property
    def busy(self) -> bool:
        """Whether an order runs."""
        return self._order is not None

    def keep(self, path: str, settings: dict[str, Any]) -> None:
        """Takes a new picture in; the oldest beyond MAX_HISTORY go, and their files with them."""
        kept = Kept(path, settings)
        self.history.insert(0, kept)
        self.latest.append(kept)
        self.chosen = settings
        for old in self.history[MAX_HISTORY:]:
            Path(old.path).unlink(missing_ok=True)
        del self.history[MAX_HISTORY:]

    def drop_messages(self, first: int) -> None:
        """Removes the messages from number `first` on, and their files."""
        unlink(self.messages[first:])
        del self.messages[first:]

    def shorten(self) -> None:
        """Removes the oldest messages beyond MAX_MESSAGES."""
        unlink(self.messages[:-MAX_MESSAGES])
        del self.messages[:-MAX_MESSAGES]

    def new_conversation(self) -> None:
        """Stops the running turn and forgets the conversation."""
        self.cancel()
        with self._lock:
            self._order = None  # the turn that ends may not hold up the next one
        self.conversation = None
        old, self.messages = self.messages, []
        unlink(old)

    def forget(self) -> None:
        """Removes everything, when the visitor has gone."""
        self.new_conversation()
        for kept in self.history:
            Path(kept.path).unlink(missing_ok=True)
        self.history.clear()
        self.latest.clear()
        self.chosen = None


def unlink(messages: list[Message]) -> None:
    """Removes the files of messages."""
    for message in messages:
        if message["file"]:
            Path(message["file"]).unlink(missing_ok=True)


class Visits:
    """All visits, the one used longest ago first.

    Args:
        clock: seconds; another one in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._visits: OrderedDict[str, Visit] = OrderedDict()
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._lock, self._clock = threading.Lock(), clock

    def __len__(self) -> int:
        return len(self._visits)

    def open(self, name: object) -> Visit:
        """The visit of that name, or a new one under a name of its own where there is none."""
        with self._lock:
            visit = self._visits.get(name) if isinstance(name, str) else None
            if visit is None:
                visit = Visit(secrets.token_urlsafe(16))
                self._visits[visit.name] = visit
            visit.used = self._clock()
            self._visits.move_to_end(visit.name)
            gone = self._outdated()
        for old in gone:
            old.forget()
        return visit

    def of_session(self, session: str | None) -> Visit:
        """The visit of an API client, by the session that Gradio gives it."""
        key = f"session:{session}"
        with self._lock:
            known = self._sessions.get(key)
        visit = self.open(known)
        with self._lock:
            self._sessions[key] = visit.name
            while len(self._sessions) > MAX_VISITS:
                self._sessions.popitem(last=False)
        return visit

    def _outdated(self) -> list[Visit]:
        """Takes out those that are too old or too many; visits that draw stay."""
        old = [v for v in self._visits.values() if not v.busy and self._clock() - v.used > VISIT_SECONDS]
        idle = [v for v in list(self._visits.values())[:-1] if not v.busy and v not in old]
        surplus = len(self._visits) - len(old) - MAX_VISITS
        gone = old + idle[: max(0, surplus)]
        for visit in gone:
            del self._visits[visit.name]
        return gone

    def clear(self) -> None:
        """Forgets all visits."""
        with self._lock:
            gone = list(self._visits.values())
            self._visits.clear()
        for visit in gone:
            visit.forget()
