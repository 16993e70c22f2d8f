"""`best_of`: a picture that does not show what was asked for is drawn again, by the model's own reading.

Design choices
- What was asked for is compared with what the model reads in its own drawing (`mm.pipelines.self_reader`): numbers,
  kinds, colours, a position, the style and the background. Where something is missing, the picture is drawn again,
  from a seed that is derived from its own, up to `best_of` times in all. A picture that is right costs one drawing and
  a reading.
- Tries of several pictures are drawn together. Each depends on its picture's seed alone, so that a seed gives the same
  picture at any batch size.
- Where no try is right, the one that is the least wrong is kept, the earliest of several.

Legend: B pictures, C latent channels, H = W latents a side.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from mm.core.checks import whole
from mm.core.errors import UserError
from mm.pipelines.run_state import Run
from mm.pipelines.self_reader import Shortfall

Callback = Callable[[Any, int, Any, dict[str, Any]], Any]
MOST_TRIES = 64


@dataclass
class CheckedOutput(ImagePipelineOutput):
    """Pictures of a call with `best_of`, or with `fast` in codes mode.

    Attributes:
        images: The pictures.
        tries: How often each was drawn.
        right: Whether each shows what was asked for, as the model reads it; None where nothing was checked, since the
            prompt is not read in full.
        missing: What each lacks, in words.
        steps: Sampling steps of a try of each; `fast` takes more for what is not checked.
    """

    tries: list[int]
    right: list[bool | None]
    missing: list[list[str]]
    steps: list[int]


@dataclass(frozen=True, kw_only=True)
class Best:
    """What `draw_best` keeps: latents (B, C, H, W), how often each picture was drawn, and what it lacks."""

    latents: torch.Tensor
    tries: list[int]
    shortfalls: list[Shortfall | None]

    def output(self, pictures: Any, steps: list[int]) -> CheckedOutput:
        """The pipeline's output with these pictures, and the steps of each."""
        right = [None if found is None else not found.wrong for found in self.shortfalls]
        missing = [[] if found is None else list(found.missing) for found in self.shortfalls]
        return CheckedOutput(pictures, self.tries, right, missing, steps)


def unchecked_output(pictures: Any, count: int, steps: int) -> CheckedOutput:
    """The output of pictures of which none could be checked."""
    return CheckedOutput(pictures, [1] * count, [None] * count, [[] for _ in range(count)], [steps] * count)


def seed_of_try(seed: int, k: int) -> int:
    """The seed of try `k` of a picture; the first has the picture's own."""
    if k == 0:
        return seed
    return int.from_bytes(hashlib.blake2s(f"{seed} try {k}".encode(), digest_size=8).digest(), "big") >> 1


def check_best_of(best_of: int, latents: torch.Tensor | None) -> None:
    """Raises UserError for a number of tries that cannot be."""
    whole("best_of", best_of, 1, MOST_TRIES)
    if best_of > 1 and latents is not None:
        raise UserError(
            "latents fix the starting noise, so every try of best_of would be the same; leave one of them out"
        )


def draw_best(
    draw: Callable[[Sequence[int], Sequence[torch.Generator]], torch.Tensor],
    check: Callable[[Sequence[int], torch.Tensor], list[Shortfall | None]],
    generators: Sequence[torch.Generator],
    best_of: int,
    run: Run,
) -> Best:
    """The best of up to `best_of` tries of each picture.

    Args:
        draw: Draws latents (B, C, H, W) of pictures of the call, by their numbers, each with its generator.
        check: What the latents of these pictures lack; None where nothing is checked.
        generators: One a picture; their seeds count.
        best_of: The most tries of a picture.
        run: Of all tries; once it is interrupted, what is kept stays, and nothing more is drawn.
    """
    seeds = [generator.initial_seed() for generator in generators]
    everything = list(range(len(seeds)))
    best = draw(everything, generators)
    kept = check(everything, best)
    tries = [1] * len(seeds)
    for k in range(1, best_of):
        rows = [i for i, found in enumerate(kept) if found is not None and found.wrong]
        if not rows or run.interrupt:
            break
        again = [torch.Generator().manual_seed(seed_of_try(seeds[i], k)) for i in rows]
        with warnings.catch_warnings():  # of unknown words, which the first try has warned of
            warnings.simplefilter("ignore")
            drawn = draw(rows, again)
        if run.interrupt:  # what was drawn is not finished
            break
        for i, latents, found in zip(rows, drawn, check(rows, drawn), strict=True):
            tries[i] = k + 1
            if found is not None and found.wrong < _wrong(kept[i]):
                best[i], kept[i] = latents, found
    return Best(latents=best, tries=tries, shortfalls=kept)


def passing_on(callback: Callback | None, run: Run) -> Callback | None:
    """The callback of a try: one that interrupts its try interrupts the run of all tries, and what follows of it."""
    if callback is None:
        return None

    def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        changed = callback(pipe, step, timestep, tensors)
        run.interrupt = run.interrupt or pipe.interrupt
        pipe._interrupt = run.interrupt
        return changed

    return on_step


def _wrong(found: Shortfall | None) -> float:
    return 0 if found is None else found.wrong
