"""What the Talk tab does, without any widget: one conversation a visitor, words and pictures in and out.

Design choices
- Messages are plain dicts (role, text, file). They grow while the model generates, so that words and steps are shown at
  once.
- A stop is a flag that is checked after every event; then the turn is removed from pipeline and messages.
- A conversation that is full says so, and a new one is a button away: what was said is never dropped in silence.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.errors import UserError
from mm.core.png_settings import drawing_settings, save_png
from mm.models.dialogue import detokenize
from mm.pipelines.pictures import open_picture

if TYPE_CHECKING:
    from mm import InterleavedPipeline
    from mm.pipelines.interleaved import Conversation, Event

Message = dict[str, Any]  # {"role": "user" or "assistant", "text": ..., "file": path or None}


class Visit:
    """One visitor's conversation: what the model has read, what was shown, and whether to stop."""

    def __init__(self) -> None:  # no dataclass: Gradio would write one out, and an Event cannot be
        self.conversation: Conversation | None = None
        self.messages: list[Message] = []
        self.seed = 0
        self.stopped = threading.Event()

    def __deepcopy__(self, memo: dict[int, Any]) -> Visit:
        return Visit()  # Gradio copies the initial state for every visitor, and an Event cannot be copied

    def forget(self) -> None:
        """Removes the files, when the visitor has gone."""
        self.stopped.set()
        for message in self.messages:
            if message["file"]:
                Path(message["file"]).unlink(missing_ok=True)
        self.messages.clear()
        self.conversation = None


class Talker:
    """A conversing pipeline with a folder for its pictures."""

    def __init__(self, pipe: InterleavedPipeline, folder: Path, model: str = "mm-tiny") -> None:
        self.pipe, self.folder, self.model = pipe, folder, model

    def say(self, words: str, picture: str | None, visit: Visit, *, steps: int = 12) -> Iterator[list[Message]]:
        """The visitor's turn and the reply; yields all messages whenever something was added.

        Raises UserError for an empty turn, a bad picture or a full conversation; then, and after a stop, the messages
        are what they were before.
        """
        if visit.conversation is None:
            visit.conversation, visit.seed = self.pipe.start(), secrets.randbelow(2**31)
        visit.stopped.clear()
        before = len(visit.messages)
        given = None if picture is None else open_picture(picture)
        shown = None if given is None else self._keep(given, None)
        visit.messages.append({"role": "user", "text": words, "file": shown})
        done = False
        try:
            yield visit.messages
            events = self.pipe.turn(visit.conversation, words, given, seed=visit.seed, steps=steps)
            for _ in self._replies(events, words, visit, steps):
                yield visit.messages
                if visit.stopped.is_set():
                    events.close()
                    raise UserError("stopped; nothing of this turn was kept")
            done = True
        finally:
            if not done:
                for message in visit.messages[before:]:
                    if message["file"]:
                        Path(message["file"]).unlink(missing_ok=True)
                del visit.messages[before:]

    def _replies(self, events: Iterator[Event], words: str, visit: Visit, steps: int) -> Iterator[None]:
        said: list[str] = []
        reply: Message = {"role": "assistant", "text": "", "file": None}
        for event in events:
            if not said and not reply["text"] and event.kind != "end":
                visit.messages.append(reply)
            if event.kind == "word":
                said.append(event.word)
                reply["text"] = detokenize(said)
            elif event.kind == "step":
                reply["text"] = f"drawing: step {event.step} of {event.steps}"
            elif event.picture is not None:
                assert visit.conversation is not None
                used = visit.seed + visit.conversation.pictures - 1
                settings = drawing_settings(prompt=words, seed=used, steps=steps, mode="flow", model=self.model)
                reply["text"], reply["file"] = "", self._keep(event.picture, settings)
            yield

    def _keep(self, picture: Any, settings: dict[str, Any] | None) -> str:
        path = self.folder / f"talk-{secrets.token_hex(8)}.png"
        save_png(path, picture, settings)
        return str(path)
