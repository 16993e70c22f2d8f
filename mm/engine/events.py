"""What a run says while it goes on. Every run ends with `Done`; an error is raised instead."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Step:
    """A sampling step is done: `step` of `steps`, for the pictures `first` to `first + count - 1` of the request."""

    step: int
    steps: int
    first: int
    count: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Preview:
    """A rough picture of the latents so far: the family's linear map from latents to colours, at latent size."""

    index: int
    picture: Image.Image


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A finished picture with the settings that draw it again. `index` counts from 0 in the request."""

    index: int
    seed: int
    picture: Image.Image
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Words:
    """A piece of an answer, in order. The pieces of an answer are joined as they are.

    `outside`: the picture is of a kind that the model was not trained on, so that the answer says little.
    """

    text: str
    outside: bool = False


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A warning for the user, each once a run."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end: `pictures` were finished; `cancelled` where the run was stopped before it had all."""

    pictures: int
    cancelled: bool = False


Event = Step | Preview | Picture | Words | Notice | Done


class RunCancelledError(Exception):
    """A run ends because its `CancelToken` was used."""


class CancelToken:
    """Stops a run from another thread or a signal handler, within one sampling step."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Asks the run to stop; what is finished is kept."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._event.is_set()
