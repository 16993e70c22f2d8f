"""The tries of `TextToImagePipeline`: several drawings of each picture, of which the best one is kept.

Pictures that are checked and those that are not are drawn in calls of their own, since `fast` draws them otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from mm.core.errors import UserError
from mm.families.mm_tiny import steps_for
from mm.pipelines.batch_parts import joined, parts_of
from mm.pipelines.best_of import CheckedOutput, draw_best, passing_on
from mm.pipelines.fast import FastCodes, Tries
from mm.pipelines.prompt_encoding import Conditions
from mm.pipelines.sampling import Generators, picture_generators
from mm.world.asked import Asked


def draw_tries(
    pipe: Any, given: Conditions, asked: Sequence[Asked | None], generator: Generators, plan: Tries, output_type: str,
    **options: Any,
) -> CheckedOutput:  # fmt: skip
    """The best of several tries of each picture.

    Args:
        pipe: A `TextToImagePipeline`.
        given: The prompts.
        asked: What each picture must show; None is not checked.
        generator: As in a call.
        plan: How many tries, and how they are drawn.
        output_type: As in a call.
        options: Further arguments of the call.

    Raises:
        UserError: For prompts that were encoded before.
    """
    if given.texts is None:
        raise UserError("best_of compares pictures with their prompts; give prompt, not prompt_embeds")
    prompts = [text for text in given.texts for _ in range(given.each)]

    def draw_alike(rows: Sequence[int], generators: Sequence[torch.Generator], checked: bool) -> torch.Tensor:
        some, less = [prompts[i] for i in rows], plan.settings(checked=checked)
        own = options | given.negatives_of(rows) | {"num_inference_steps": plan.own}
        own["fast"] = False if less is None else asdict(less)
        with warnings.catch_warnings():  # of unknown words, which were warned of before
            warnings.simplefilter("ignore")
            return pipe(some, generator=list(generators), output_type="latent", strict=False, **own).images

    def draw(rows: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
        kinds = [not isinstance(plan.less, FastCodes) or asked[i] is not None for i in rows]
        return in_parts(kinds, rows, generators, draw_alike)

    generators = picture_generators(generator, len(prompts))
    check = pipe._checker(asked)
    with pipe._new_run(guidance_scale=options["guidance_scale"]) as run:
        options["callback_on_step_end"] = passing_on(options["callback_on_step_end"], run)
        best = draw_best(draw, check, generators, plan.most, run)
    latents: Any = best.latents
    steps = _steps(plan, asked, options["mode"], options["sigmas"])
    if output_type == "latent":
        return best.output(latents, steps)
    parts = parts_of(pipe, len(generators))
    pictures = joined([pipe._decode(latents[part], output_type, options["height"]) for part in parts])
    return best.output(pictures, steps)


def _steps(plan: Tries, asked: Sequence[Asked | None], mode: str, sigmas: Sequence[float] | None) -> list[int]:
    """Sampling steps of a try of each picture."""
    if sigmas is not None:
        return [len(sigmas)] * len(asked)
    return [plan.steps(steps_for(mode), checked=one is not None) for one in asked]


def in_parts(
    kinds: Sequence[bool], rows: Sequence[int], generators: Sequence[torch.Generator],
    draw: Callable[[Sequence[int], Sequence[torch.Generator], bool], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """Latents of pictures of which those of one kind are drawn together, in at most two calls.

    Args:
        kinds: One a picture.
        rows: The pictures' numbers.
        generators: One a picture.
        draw: Draws pictures of one kind; its last argument is the kind.
    """
    drawn: dict[int, torch.Tensor] = {}
    for kind in dict.fromkeys(kinds):
        at = [i for i, one in enumerate(kinds) if one == kind]
        drawn |= zip(at, draw([rows[i] for i in at], [generators[i] for i in at], kind), strict=True)
    return torch.stack([drawn[i] for i in range(len(rows))])
