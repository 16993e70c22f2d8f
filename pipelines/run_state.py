"""The state of one drawing run, kept apart from the pipeline, so that runs of one pipeline do not affect each other.

Design choices
- `Run` holds what diffusers' pipelines keep as attributes: guidance scale, number of steps, the interrupt flag, and a
  scheduler of its own, since schedulers count their steps.
- Callbacks written for diffusers still work: within a step callback the pipeline's properties (`guidance_scale`,
  `num_timesteps`, `interrupt`, and `_interrupt` and `_guidance_scale`, which may be set) are those of the run that
  called back. A context variable says which run that is, so threads and interleaved generators keep apart.
- Outside of callbacks the properties are those of the run that started last, and setting `_interrupt` interrupts every
  run of the pipeline that is in progress.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from mm.core.errors import UserError
from mm.pipelines.fast import FastCodes, FastFlow

StepCallback = Callable[[int, Any, torch.Tensor], torch.Tensor]
_CURRENT: ContextVar[Run | None] = ContextVar("run of the step callback", default=None)


@dataclass(kw_only=True, eq=False)
class Run:
    """One call of a pipeline.

    Attributes:
        guidance_scale: Of classifier-free guidance; a callback may change it between steps.
        scheduler: A copy of the pipeline's scheduler; None where no scheduler is used.
        sigmas: Noise levels of the steps, where the call gives them.
        temperature: Of sampling in codes mode.
        fast: Settings of less work a picture (`FastFlow` or `FastCodes`); None does all of it.
        num_timesteps: Steps of the run.
        interrupt: Whether to stop before the next step.
    """

    guidance_scale: float
    scheduler: Any = None
    sigmas: Sequence[float] | None = None
    temperature: float = 1.0
    fast: FastFlow | FastCodes | None = None
    num_timesteps: int = 0
    interrupt: bool = False

    def step_callback(self, pipe: Any, callback: Callable[..., Any] | None, names: Sequence[str]) -> StepCallback:
        """A function to call after each step, which hands the latents to the user's callback and takes them back.

        Args:
            pipe: Passed to the callback, as in diffusers.
            callback: `callback(pipe, step, timestep, tensors)`, which may return changed tensors; or None.
            names: Which tensors it wants.
        """

        def on_step(step: int, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
            if callback is None:
                return latents
            token = _CURRENT.set(self)
            try:
                offered = {"latents": latents}
                changed = callback(pipe, step, timestep, {name: offered[name] for name in names})
            finally:
                _CURRENT.reset(token)
            return (changed or {}).get("latents", latents)

        return on_step


class RunStateMixin:
    """diffusers' run-time properties for a pipeline whose runs keep their own state."""

    scheduler: Any
    _runs: list[Run]
    _last_run: Run

    def _init_runs(self) -> None:
        self._runs, self._last_run = [], Run(guidance_scale=1.0)

    @contextmanager
    def _new_run(self, **state: Any) -> Iterator[Run]:
        """A run that is in progress within the context."""
        run = Run(scheduler=copy.deepcopy(self.scheduler), **state)
        self._runs.append(run)
        self._last_run = run
        try:
            yield run
        finally:
            self._runs.remove(run)

    def _state(self) -> Run:
        """The run of the current callback; else the one that started last."""
        current = _CURRENT.get()
        return current if current in self._runs and current is not None else self._last_run

    @property
    def guidance_scale(self) -> float:
        """The run's scale of classifier-free guidance."""
        return self._state().guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the run uses guidance."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the run."""
        return self._state().num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run stops before its next step."""
        return self._state().interrupt

    @property
    def _num_timesteps(self) -> int:
        return self.num_timesteps

    @property
    def _guidance_scale(self) -> float:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        if _CURRENT.get() not in self._runs:
            raise UserError("_guidance_scale can be set within a step callback only; pass guidance_scale to the call")
        self._state().guidance_scale = scale

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, stop: bool) -> None:
        current = _CURRENT.get()
        for run in [current] if current is not None and current in self._runs else list(self._runs):
            run.interrupt = stop
