"""A run's own view of a pipeline: the same modules, its own scheduler and call state.

diffusers' pipelines keep the state of a call (guidance, timesteps, interrupt flag) and their scheduler's position on
the pipeline. Two runs on one object would overwrite each other. A shallow copy with a scheduler of its own costs
microseconds and no memory for weights.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from mm.core.errors import UserError


def view_of(pipe: Any, scheduler: str | None = None) -> Any:
    """A shallow copy of a diffusers pipeline with its own scheduler.

    Args:
        pipe: a diffusers pipeline.
        scheduler: class name of another scheduler that is compatible with the model's own; None keeps the class.

    Raises:
        UserError: for a scheduler that does not fit, with those that do, and for one that needs another package.
    """
    view = copy.copy(pipe)
    view._progress_bar_config = {"disable": True}
    own = getattr(pipe, "scheduler", None)
    if scheduler is not None:
        view.scheduler = _other_scheduler(own, scheduler)
    elif own is not None:
        view.scheduler = copy.deepcopy(own)
    return view


def schedulers_for(pipe: Any) -> tuple[str, ...]:
    """Class names of the diffusers schedulers that can take the place of a pipeline's own."""
    own = getattr(pipe, "scheduler", None)
    try:
        return tuple(sorted(kind.__name__ for kind in getattr(own, "compatibles", ()))) if own is not None else ()
    except (ImportError, AttributeError):  # a list that names a class of another version
        return (type(own).__name__,)


def _other_scheduler(own: Any, name: str) -> Any:
    if own is None:
        raise UserError(f"scheduler is {name!r}, and this model draws without one; leave it out")
    kinds = {kind.__name__: kind for kind in getattr(own, "compatibles", ())} | {type(own).__name__: type(own)}
    if name not in kinds:
        raise UserError(f"scheduler is {name!r}; this model takes {', '.join(sorted(kinds))}")
    try:
        return kinds[name].from_config(own.config)
    except ImportError as error:  # diffusers lists schedulers of packages that are not here
        raise UserError(f"{' '.join(str(error).split())}; or take another scheduler") from error


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a pipeline's call by name, without self."""
    found = dict(inspect.signature(type(pipe).__call__).parameters)
    found.pop("self", None)
    return found
