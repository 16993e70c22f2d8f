"""The drawing of a turn of a conversation: one picture, again while it lacks what was asked for.

Legend: C = 16 channels, H = W = 8 latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from mm.core.self_check import lacking, unchecked
from mm.pipelines.best_of import seed_of_try
from mm.pipelines.conversation import Event, as_events
from mm.pipelines.drawing_loops import flow_steps
from mm.pipelines.drawing_parts import DrawingParts
from mm.pipelines.guidance import GuidanceBranches
from mm.pipelines.sampling import picture_generators
from mm.world.asked import Asked


@dataclass(frozen=True, kw_only=True)
class TurnDrawing:
    """How the pictures of a turn are drawn; see `InterleavedPipeline.turn`."""

    seed: int
    steps: int
    scale: float
    max_words: int
    strict: bool | None
    best_of: int


def drawn_for_turn(
    pipe: Any, branches: GuidanceBranches, seed: int, how: TurnDrawing, words: str, asked: Asked | None
) -> Generator[Event, None, torch.Tensor]:
    """Draws latents (1, C, H, W); with `best_of` again while they lack something. A warning says what is still missing.

    Args:
        pipe: An `InterleavedPipeline`.
        branches: Of guidance.
        seed: Of the first try.
        how: The settings of the turn.
        words: That are drawn, for warnings.
        asked: What the picture must show; None is not checked.
    """
    latents = yield from _try(pipe, branches, seed, how)
    if how.best_of == 1:
        return latents
    check = pipe._checker([asked])
    [least] = check([0], latents)
    for k in range(1, how.best_of):
        if least is None or not least.wrong:
            break
        drawn = yield from _try(pipe, branches, seed_of_try(seed, k), how)
        [found] = check([0], drawn)
        if found is not None and found.wrong < least.wrong:
            latents, least = drawn, found
    if least is None:
        warnings.warn(unchecked(words), stacklevel=4)
    elif least.missing:
        warnings.warn(lacking(words, how.best_of, [(seed, least.missing)]), stacklevel=4)
    return latents


def _try(
    pipe: Any, branches: GuidanceBranches, seed: int, how: TurnDrawing
) -> Generator[Event, None, torch.Tensor]:  # fmt: skip
    """Draws latents (1, C, H, W) from a seed."""
    generators = picture_generators(torch.Generator().manual_seed(seed), 1)
    noise = pipe.prepare_latents(generators, None)
    with pipe._new_run(guidance_scale=how.scale) as run:
        parts = DrawingParts(
            trunk=pipe.trunk, generators=generators, branches=branches, steps=how.steps, run=run,
            on_step=run.step_callback(pipe, None, ()),
        )  # fmt: skip
        return (yield from as_events(flow_steps(parts, pipe.velocity_decoder, noise), how.steps))
