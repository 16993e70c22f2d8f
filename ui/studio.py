"""What the Draw tab does, without any widget: draws picture by picture, keeps files, can be cancelled.

Design choices
- Pictures are drawn one at a time, so that each appears when done and a cancel loses at most the current one.
- A cancel is a flag of the session, checked after every step: Gradio's own `cancels=` stops only between yields.
- Files live in a folder of the app's own and are what the page shows and offers: Gradio re-encodes PIL pictures and
  would drop their settings.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm.core.errors import UserError
from mm.core.png_settings import drawing_settings, save_png
from mm.families.mm_tiny import GUIDANCE

if TYPE_CHECKING:
    from mm import TextToImagePipeline

MAX_COUNT = 16
MAX_STEPS = 50
MAX_HISTORY = 200  # pictures of one visitor; more than MAX_COUNT, so that an order never loses its own


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a user asks for. Seed None is drawn at random."""

    prompt: str
    seed: int | None = None
    count: int = 1
    steps: int = 12
    mode: str = "flow"
    guidance: float = GUIDANCE

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_COUNT:
            raise UserError(f"count is {self.count}; give 1 to {MAX_COUNT}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"steps is {self.steps}; give 1 to {MAX_STEPS}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; give 0 to {2**32 - 1}")
        if not 0 <= self.guidance <= 100:  # a NaN, which JSON lets through, fails here too
            raise UserError(f"guidance is {self.guidance}; give 0 to 100")


class Session:
    """One visitor's pictures with their settings, and whether they asked to stop.

    `history`: all, newest first, at most MAX_HISTORY; `latest`: those of the last order, oldest first; `chosen`: the
    settings of the selected one.
    """

    def __init__(self) -> None:
        self.history: list[tuple[str, dict[str, Any]]] = []
        self.latest: list[tuple[str, dict[str, Any]]] = []
        self.chosen: dict[str, Any] | None = None
        self.cancelled = threading.Event()

    def keep(self, path: str, settings: dict[str, Any]) -> None:
        """Takes a new picture in; the oldest beyond MAX_HISTORY go, and their files with them."""
        self.history.insert(0, (path, settings))
        self.latest.append((path, settings))
        self.chosen = settings
        for old, _ in self.history[MAX_HISTORY:]:
            Path(old).unlink(missing_ok=True)
        del self.history[MAX_HISTORY:]

    def forget(self) -> None:
        """Removes the files, when the visitor has gone."""
        self.cancelled.set()
        for path, _ in self.history:
            Path(path).unlink(missing_ok=True)
        self.history.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return Session()  # Gradio copies the initial state for every visitor, and an Event cannot be copied


@dataclass(frozen=True, kw_only=True)
class OrderProgress:
    """Progress of an order: pictures done, their files, notes for the user, settings of the newest picture."""

    done: int
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None


class Studio:
    """A pipeline with a folder for its pictures."""

    def __init__(self, pipe: TextToImagePipeline, model: str = "mm-tiny", folder: Path | None = None) -> None:
        self.pipe, self.model = pipe, model
        self.folder = folder or Path(tempfile.mkdtemp(prefix="mm-ui-"))

    def draw(
        self, order: Order, session: Session, on_step: Callable[[int, int], None] = lambda picture, step: None
    ) -> Iterator[OrderProgress]:
        """Draws an order; yields after every picture. What was done before a cancel stays.

        `on_step` is called after every step with the numbers of the current picture and of the step, from 0.
        """
        session.latest = []
        first = secrets.randbelow(2**31) if order.seed is None else order.seed
        files: list[str] = []
        notes: list[str] = []
        for k in range(order.count):
            if session.cancelled.is_set():  # while the order stood in the queue, or between two pictures
                yield self._stopped(session, order, files, notes)
                return
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                picture = self._one(order, first + k, session, partial(on_step, k))
            notes += [str(w.message) for w in caught if issubclass(w.category, UserWarning) and k == 0]
            if session.cancelled.is_set():
                yield self._stopped(session, order, files, notes)
                return
            settings = drawing_settings(
                prompt=order.prompt, seed=first + k, steps=order.steps, mode=order.mode, guidance=order.guidance,
                model=self.model,
            )  # fmt: skip
            path = self.folder / f"{secrets.token_hex(8)}-s{first + k}.png"
            save_png(path, picture, settings)
            files.append(str(path))
            session.keep(str(path), settings)
            yield OrderProgress(done=k + 1, files=tuple(files), notes=tuple(notes), settings=settings)

    @staticmethod
    def _stopped(session: Session, order: Order, files: list[str], notes: list[str]) -> OrderProgress:
        """What there is when an order was cancelled; the next one starts with a clean flag."""
        session.cancelled.clear()
        ended = (*notes, f"stopped after {len(files)} of {order.count} pictures")
        return OrderProgress(done=len(files), files=tuple(files), notes=ended)

    def _one(self, order: Order, seed: int, session: Session, on_step: Callable[[int], None]) -> Any:
        def watch(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            on_step(step)
            pipe._interrupt = session.cancelled.is_set()
            return {}

        return self.pipe(
            order.prompt,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=order.steps,
            guidance_scale=order.guidance,
            mode=order.mode,
            callback_on_step_end=watch,
        ).images[0]
