"""What the Talk tab does, without any widget: one conversation a visit, words and pictures in and out.

Design choices
- Messages are plain dicts (role, text, file). They grow while the model generates, so that words and steps are shown at
  once.
- A turn that is stopped or fails is removed, from the conversation and from the messages.
- A conversation may have any length; what it forgets of a long one is said in a notice.
- A given picture is made smaller before it is kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mm.core.errors import UserError
from mm.engine.events import CancelToken
from mm.engine.requests import Turn
from mm.ui import forms
from mm.ui.limits import KEPT_SIDE
from mm.ui.orders import Orders, Progress
from mm.ui.uploads import read_upload
from mm.ui.visits import Message, Visit, unlink


@dataclass(frozen=True, kw_only=True)
class Said:
    """The messages so far, and how far the reply is."""

    messages: list[Message]
    progress: Progress


def say(
    orders: Orders, visit: Visit, words: object, given: object, *, reads: Callable[[], bool] = lambda: True
) -> Iterator[Said]:
    """A turn of the visitor and the reply.

    Args:
        orders: with the engine.
        visit: whose conversation goes on.
        words: what the visitor says.
        given: an uploaded picture, or None.
        reads: see `Orders.run`.

    Yields:
        All messages whenever something was added.

    Raises:
        UserError: for an empty turn, a bad picture or a turn that was stopped; the messages are
            then what they were before.
    """
    token = visit.begin()
    messages, before, done = visit.messages, len(visit.messages), False
    try:
        text, picture = forms.words("the message", words), read_upload(given, KEPT_SIDE)
        if visit.conversation is None:
            visit.conversation, visit.seed = orders.engine.converse(), secrets.randbelow(2**31)
        file = None if picture is None else orders.keep(picture, None)
        messages.append({"role": "user", "text": text, "file": file})
        turn = Turn(conversation=visit.conversation, words=text, image=picture, seed=visit.seed)
        for now in orders.run(turn, token, reads=reads):
            _show(messages, before + 1, now)
            done = now.state == "done"
            yield Said(messages=list(messages), progress=now)
        if not done:
            raise UserError("stopped; nothing of this turn was kept")
        visit.shorten()
    finally:
        _end(visit, token, messages, before, done)


def _end(visit: Visit, token: CancelToken, messages: list[Message], before: int, done: bool) -> None:
    """Removes what a turn has added unless it is done; a new conversation has removed it already."""
    if visit.messages is not messages:
        unlink(messages[before:])
    elif not done:
        visit.drop_messages(before)
    visit.end(token)


def _show(messages: list[Message], first: int, now: Progress) -> None:
    """Writes the reply so far into the messages from number `first` on: words, then pictures, then the current step."""
    reply: list[Message] = []
    if now.text:
        reply.append({"role": "assistant", "text": now.text, "file": None})
    reply += [{"role": "assistant", "text": "", "file": file} for file in now.files]
    if now.step and now.state == "running":
        reply.append({"role": "assistant", "text": f"drawing: step {now.step} of {now.steps}", "file": None})
    messages[first:] = reply
