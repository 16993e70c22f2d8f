"""The state of a conversation, and the events of a turn."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from PIL import Image

from mm.world.asking.edit_words import Seen
from mm.world.facts import Facts

MAX_SHOWN = 64  # pictures that "undo" can go back to


@dataclass(frozen=True, kw_only=True)
class Event:
    """A word, a step of a drawing, a picture, or the end of the turn.

    Attributes:
        kind: What it is.
        word: Of "word".
        step: Of "step", from 1.
        steps: Of "step": how many there are.
        picture: Of "picture".
        seed: Of "picture": the seed that it was drawn from; None for a picture that the user gave.
    """

    kind: Literal["word", "step", "picture", "end"]
    word: str = ""
    step: int = 0
    steps: int = 0
    picture: Image.Image | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture of a conversation.

    Attributes:
        latents: Its latents (1, C, H, W).
        tokens: Its understanding tokens (1, S, D).
        seed: The seed that it was drawn from; None for a picture that the user gave.
        facts: What the model's description says; None until it was asked for.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    seed: int | None = None
    facts: Facts | None = None


@dataclass(kw_only=True)
class Conversation:
    """The state of a conversation.

    Attributes:
        shown: Its pictures in order, the latest last; "undo" goes back in it.
        pictures: How many pictures were drawn.
        drawn: What the last new picture was drawn from, for "another one".
        topic: The object that "it" stands for.
        turns: How many turns there were.
    """

    shown: list[Shown] = field(default_factory=list)
    pictures: int = 0
    drawn: str | None = None
    topic: str | None = None
    turns: int = 0

    @property
    def last(self) -> Shown | None:
        """The picture that edits and questions are about."""
        return self.shown[-1] if self.shown else None

    @property
    def seen(self) -> Seen:
        """What an instruction can refer to."""
        facts = None if self.last is None else self.last.facts
        return Seen(groups=() if facts is None else facts.groups, topic=self.topic)

    def copy(self) -> Conversation:
        """The same state; later turns of one do not change the other."""
        return replace(self, shown=list(self.shown))

    def become(self, other: Conversation) -> None:
        """Takes over the state of another."""
        self.shown, self.pictures, self.drawn = other.shown, other.pictures, other.drawn
        self.topic, self.turns = other.topic, other.turns

    def add(self, picture: Shown) -> bool:
        """Adds a picture; returns whether the oldest one had to go."""
        self.shown.append(picture)
        full = len(self.shown) > MAX_SHOWN
        del self.shown[: len(self.shown) - MAX_SHOWN if full else 0]
        return full


def said(reply: str) -> Iterator[Event]:
    """A reply word by word."""
    for word in reply.split():
        yield Event(kind="word", word=word)


def as_events(drawing: Generator[int, None, torch.Tensor], steps: int) -> Generator[Event, None, torch.Tensor]:
    """A drawing's steps as events; returns what it returns."""
    while True:
        try:
            done = next(drawing)
        except StopIteration as end:
            return end.value
        yield Event(kind="step", step=done, steps=steps)
