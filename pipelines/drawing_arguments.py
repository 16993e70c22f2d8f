"""Checks of the arguments that the pipelines of our model share, before anything is drawn."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch

from mm.core.checks import shown
from mm.core.errors import UserError
from mm.core.nouns import with_article
from mm.core.pictures import OUTPUT_TYPES

MAX_GUIDANCE = 100


def check_scale(name: str, value: object, note: str = "") -> None:
    """Raises UserError unless a guidance scale is a number that can be followed."""
    if not _is_number(value) or not 0 <= value <= MAX_GUIDANCE:  # type: ignore[operator]
        raise UserError(f"{name} is {shown(value)}; give 0 to {MAX_GUIDANCE}{note}")


def check_temperature(temperature: object) -> None:
    """Raises UserError unless `temperature` is a finite number of 0 or more."""
    if not _is_number(temperature) or not 0 <= temperature < math.inf:  # type: ignore[operator]
        raise UserError(f"temperature is {shown(temperature)}; give 0 or more")


def check_count(name: str, value: object) -> None:
    """Raises UserError unless `value` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise UserError(f"{name} is {shown(value)}; give a whole number, 1 or more")


def check_mode(mode: object, modes: Sequence[str], known: Sequence[str], latents: object) -> None:
    """Raises UserError for a mode that is unknown, that a pipeline has no parts for, or that takes no noise.

    Args:
        mode: As given.
        modes: That the pipeline's components can draw in.
        known: That any pipeline can draw in.
        latents: The starting noise that was given, or None.
    """
    if mode not in known:
        raise UserError(f"unknown mode {mode!r}; known: {', '.join(known)}")
    if mode not in modes:
        raise UserError("this model has no code_head and bridge, which mode='codes' needs; use mode='flow'")
    if latents is not None and not isinstance(latents, torch.Tensor):
        raise UserError(f"latents are {with_article(type(latents).__name__)}; give a tensor")
    if mode == "codes" and latents is not None:
        raise UserError("latents are the starting noise of mode='flow'; with mode='codes' leave them out")


def check_output_type(output_type: object, *, decodes: bool) -> None:
    """Raises UserError for an unknown type, or one that needs an autoencoder where `decodes` says there is none."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
    if not decodes and output_type != "latent":
        raise UserError("this pipeline has no autoencoder; it gives output_type='latent' only")


def check_callback_tensors(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises UserError where a callback asks for tensors that there are none of."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"callbacks may ask for {known}, not {unknown}")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
