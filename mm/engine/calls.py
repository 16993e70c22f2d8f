"""One call of a diffusers pipeline: arguments by keyword, a generator for each picture, a callback after each step.

Design choices
- Picture k has a generator of its own with seed + k, drawn on the CPU, so that the number of pictures in a call and
  their order change no noise.
- Cancelling raises after a step: that leaves every pipeline within a step, also those that ignore `_interrupt`.
- Steps are seen by `mm.families.stepping`, with or without a step callback of the pipeline; the scheduler is the run's
  own copy.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mm.core.checks import shown
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.core.self_check import lacking, unchecked
from mm.engine.events import CancelToken, RunCancelledError
from mm.engine.views import call_parameters
from mm.families.frames import pictures_of
from mm.families.stepping import AfterStep, stepping


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A picture, as the pipeline gives it, and its sampling steps where the pipeline itself decided on them."""

    picture: Any
    steps: int | None = None


OnStep = Callable[[int, Any], None]  # number of the step from 0, and the latents where the pipeline offers them


def draw(
    view: Any,
    arguments: Mapping[str, Any],
    seeds: Sequence[int],
    *,
    steps: int | None,
    cancel: CancelToken,
    on_step: OnStep,
    change: AfterStep = lambda step, latents, timestep: None,
) -> list[Made]:
    """Calls a pipeline once for `len(seeds)` pictures.

    Args:
        view: from `view_of`, so that the call's state is this run's.
        arguments: of the call, by name; generator, step count and callback are added here.
        seeds: one a picture; of as many as prompts, where "prompt" is a list.
        steps: sampling steps; None leaves the pipeline's default.
        cancel: asked after every step.
        on_step: called after every step.
        change: gives latents to go on with after a step, or None; it is called first.

    Returns:
        The pictures (PIL unless `output_type` says otherwise).

    Raises:
        RunCancelledError: once `cancel` says so.
        UserError: for an argument that the pipeline does not take, or a value that its own checks refuse.
    """
    takes = call_parameters(view)
    given = {key: value for key, value in arguments.items() if value is not None}
    check_arguments(type(view), takes, given)
    if len(seeds) > 1 and "num_images_per_prompt" not in takes and not isinstance(given.get("prompt"), list):
        rest: dict[str, Any] = {"steps": steps, "cancel": cancel, "on_step": on_step, "change": change}
        alone = (draw(view, arguments, [seed], **rest) for seed in seeds)
        return [made for each in alone for made in each]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if "generator" in takes:
        given["generator"] = generators if len(generators) > 1 else generators[0]
    if steps is not None and "num_inference_steps" in takes:
        given["num_inference_steps"] = steps
    if len(seeds) > 1 and not isinstance(given.get("prompt"), list):
        given["num_images_per_prompt"] = len(seeds)

    def after(step: int, latents: Any, timestep: float) -> Any:
        made = change(step, latents, timestep)
        on_step(step, latents if made is None else made)
        if cancel.cancelled:
            raise RunCancelledError
        return made

    with stepping(view, given, after):
        output = _called(view, given)
    _warn_of_missing(output, given, seeds)
    pictures = list(pictures_of(output))
    steps_of_each = getattr(output, "steps", None) or [None] * len(pictures)
    return [Made(picture=one, steps=own) for one, own in zip(pictures, steps_of_each, strict=True)]


def check_arguments(kind: type, takes: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Raises UserError for arguments that a pipeline's call does not take, and for texts in the place of numbers.

    Args:
        kind: the pipeline's class.
        takes: the parameters of its call, by name.
        given: the arguments.
    """
    if unknown := [key for key in given if key not in takes]:
        raise UserError(f"{kind.__name__} takes no {', '.join(unknown)}; it takes {', '.join(sorted(takes))}")
    for name, value in given.items():
        if isinstance(value, str) and _takes_numbers_only(takes[name]):
            raise UserError(f"{name} is {shown(value)}; {kind.__name__} takes a number")


def _takes_numbers_only(parameter: inspect.Parameter) -> bool:
    """Whether a parameter's annotation, a type or its text, names numbers and None alone."""
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    types = set(re.findall(r"\w+", text)) - {"Optional", "Union", "typing", "None", "NoneType"}
    return bool(types) and types <= {"int", "float"}


def _called(view: Any, given: Mapping[str, Any]) -> Any:
    """The pipeline's output; what its own checks refuse becomes an error of one line."""
    try:
        return view(**given)
    except (UserError, UnicodeError):
        raise
    except RunCancelledError:
        free = getattr(view, "maybe_free_model_hooks", None)
        if free is not None:
            free()
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device has too little memory for this; take 4-bit weights (--bits 4), another --offload, or a smaller "
            f"--size ({' '.join(str(error).split())[:160]})"
        ) from error
    except (RuntimeError, IndexError) as error:
        strength, steps = given.get("strength"), given.get("num_inference_steps")
        if strength is None or not isinstance(steps, int) or strength * steps >= 1:
            raise  # no matter of what was asked for
        raise UserError(
            f"a strength of {strength:g} leaves none of {counted(steps, 'step')}; give a strength "
            f"of at least {1 / steps:.2g}, or "
            "more steps"
        ) from error
    except ZeroDivisionError as error:
        steps = given.get("num_inference_steps")
        if steps != 1:
            raise
        raise UserError(f"{type(view).__name__} has no schedule of one step; give more steps") from error
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{type(view).__name__} refuses this: {' '.join(str(error).split())[:600]}") from error


def _warn_of_missing(output: Any, given: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Says what pictures lack by the model's own reading, or that nothing was checked where `best_of` asks for it.

    Those that `fast` would have checked and could not are as likely to be right as others: nothing is said of them.
    """
    tries = given.get("best_of") or (given.get("fast") or {}).get("tries", 1)
    prompts: Any = given.get("prompt")
    each: list[str] = prompts if isinstance(prompts, list) else [str(prompts)] * len(seeds)
    wrong: dict[str, list[tuple[int, Sequence[str]]]] = {}
    for prompt, seed, missing in zip(each, seeds, getattr(output, "missing", None) or (), strict=False):
        if missing:
            wrong.setdefault(prompt, []).append((seed, missing))
    for prompt, found in wrong.items():
        warnings.warn(lacking(prompt, tries, found), stacklevel=3)
    right = zip(each, getattr(output, "right", None) or (), strict=False)
    for prompt in dict.fromkeys(prompt for prompt, fine in right if fine is None and "best_of" in given):
        warnings.warn(unchecked(prompt), stacklevel=3)
