"""Sources and masks of `ImageEditPipeline`: checked, brought to the model's size, and kept outside of the mask.

Legend: B pictures, C channels, H = W latents a side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.pipelines.pictures import as_pictures, open_picture, squared
from mm.pipelines.run_state import Run, StepCallback


def sources_of(image: Any, count: int) -> list[Any]:
    """The source of each of `count` instructions; one picture that is no list serves all."""
    pictures = as_pictures(image)
    if len(pictures) == 1 and not isinstance(image, (list, tuple)):
        return pictures * count
    if len(pictures) != count:
        raise UserError(f"{counted(len(pictures), 'picture')} and {counted(count, 'instruction')}; give as many")
    return pictures


def one_for_each(negatives: list[str], count: int) -> list[str]:
    """The negative prompt of each of `count` instructions."""
    if len(negatives) not in (1, count):
        raise UserError(
            f"{counted(len(negatives), 'negative prompt')} for {counted(count, 'instruction')}; give one, or one for "
            "each"
        )
    return negatives * (count // len(negatives))


def keep_outside(
    run: Run, clean: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor, on_step: StepCallback
) -> StepCallback:
    """After each step, latents outside the mask are the source's, noised to the next step's level."""
    coarse = coarse_mask(mask, clean.shape[-1])

    def keep(step: int, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
        left = run.scheduler.timesteps[step + 1 :]
        sigma = float(left[0]) / run.scheduler.config.num_train_timesteps if len(left) else 0.0
        latents = torch.where(coarse > 0, latents, (1 - sigma) * clean + sigma * noise)
        return on_step(step, timestep, latents)

    return keep


def mask_of(mask_image: Any, picture: Any, side: int) -> torch.Tensor:
    """The mask (1, 1, side, side): 1 where pixels may change."""
    [mask], source = as_pictures(mask_image, mask=True), open_picture(picture)
    if mask.size not in (source.size, (side, side)):
        raise UserError(
            f"the mask is {mask.size[0]} x {mask.size[1]} and the picture {source.size[0]} x {source.size[1]}; "
            f"give a mask of the picture's size, or of {side} x {side}"
        )
    values = np.asarray(squared(mask, side).convert("L"))
    if not (values > 127).any():
        raise UserError("the mask is black everywhere, so nothing may change; paint white where it may")
    return torch.from_numpy((values > 127).astype(np.float32))[None, None]


def coarse_mask(mask: torch.Tensor, side: int) -> torch.Tensor:
    """The mask on latents: a latent may change where any of its pixels may."""
    return F.adaptive_max_pool2d(mask, side)
