"""What a pipeline's call has after each step of sampling: read, and changed, whatever the pipeline offers for that.

Design choices
- The step callback of diffusers is used where there is one: it comes last in a step, after what the pipeline itself
  does to the latents. Other pipelines (PixArt, LongCat-Image) are seen by their scheduler's `step`, which gives the
  latents of the next step.
- Pipelines of consistency models (SANA-Sprint, LCM) decode the scheduler's second result, so that what a callback makes
  of the last latents would be lost: they are seen by the scheduler, too.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CALLBACK = "callback_on_step_end"
_DECODED_APART = ("SCMScheduler", "LCMScheduler")  # whose pipelines decode a second result

# Number of the step from 0, latents (None where the pipeline offers none), timestep. Gives latents to go on with, or
# None where they stay.
AfterStep = Callable[[int, Any, float], Any]


def gives_latents(pipe: Any) -> bool:
    """Whether latents can be read and changed after each step of a pipeline's calls."""
    return _takes_callback(pipe) or _scheduler_of(pipe) is not None


@contextmanager
def stepping(pipe: Any, given: MutableMapping[str, Any], after: AfterStep) -> Iterator[None]:
    """Within the context a call of a pipeline with these arguments has `after` called after every step.

    Args:
        pipe: of diffusers or of mm; one call at a time.
        given: arguments of the call. A callback is added where the pipeline takes one; one that is there comes first.
        after: what is called.
    """
    scheduler = _scheduler_of(pipe)
    if _takes_callback(pipe) and type(scheduler).__name__ not in _DECODED_APART:
        given[CALLBACK] = _callback(given.get(CALLBACK), after)
        yield
    elif scheduler is None:
        yield
    else:
        with replaced(scheduler, "step", _stepped(scheduler.step, after)):
            yield


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the context an object has another method; what hooks of other libraries put there comes back."""
    before = owner.__dict__.get(name)
    owner.__dict__[name] = function
    try:
        yield
    finally:
        owner.__dict__.pop(name)
        if before is not None:
            owner.__dict__[name] = before


def _takes_callback(pipe: Any) -> bool:
    return CALLBACK in inspect.signature(type(pipe).__call__).parameters


def _scheduler_of(pipe: Any) -> Any:
    found = getattr(pipe, "scheduler", None)
    return found if callable(getattr(found, "step", None)) else None


def _callback(user: Callable[..., Any] | None, after: AfterStep) -> Callable[..., dict[str, Any]]:
    """A step callback of diffusers, after that of the user."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = (user(pipe, step, timestep, tensors) if user else None) or {}
        made = after(step, changed.get("latents", tensors.get("latents")), float(timestep))
        return changed if made is None else changed | {"latents": made}

    return callback


def _stepped(step: Callable[..., Any], after: AfterStep) -> Callable[..., Any]:
    """A scheduler's `step` that goes on with what `after` gives."""
    parameters, numbers = inspect.signature(step), itertools.count()

    @functools.wraps(step)  # pipelines ask for the parameters: noise of its own comes from a generator
    def call(*args: Any, **kwargs: Any) -> Any:
        made = step(*args, **kwargs)
        time = parameters.bind(*args, **kwargs).arguments.get("timestep", 0.0)
        latents = made[0] if isinstance(made, tuple) else getattr(made, "prev_sample", None)
        new = after(next(numbers), latents, float(torch.as_tensor(time).flatten()[0]))
        return made if new is None else _with(made, latents, new)

    return call


def _with(made: Any, latents: Any, new: Any) -> Any:
    """A scheduler's result with other latents; a second result that is the same, as after the last step, follows."""

    def other(value: Any) -> Any:
        same = value is latents or (
            isinstance(value, Tensor) and value.shape == latents.shape and torch.equal(value, latents)
        )
        return new if same else value

    if isinstance(made, tuple):
        return tuple(other(value) for value in made)
    return type(made)(**{name: other(value) for name, value in made.items()})
