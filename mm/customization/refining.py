"""A subject of a picture, drawn again at the picture's full size, where its adapter knows its details.

A subject that takes a third of a picture is smaller than in the pictures that its adapter has learned from, and may
keep traces of what stood in for it. Here the part of the picture around it is enlarged to the picture's size, noised,
and drawn again by its adapter (Meng et al. 2021, SDEdit, arXiv 2108.01073), then made small again and put back.

Design choices
- The pipeline's own call draws, so that guidance, scheduler, negative prompt and size are those of the user's call. As
  long as the noise is above the strength, its latents are replaced by those of the enlarged part at that noise level;
  from then on outside the subject's place alone, so that it stays there (Lugmayr et al. 2022, RePaint, 2201.09865).
- Only the subject's place is put back, with soft edges, and without what is nearer to another subject.

Legend: B pictures, C channels, H x W latents, L tokens of packed latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mm.customization.apart_base import Call, latent_masks
from mm.customization.cutouts import covered, cut
from mm.customization.data import whole_tensor
from mm.customization.objectives.protocol import Objective
from mm.customization.places import Box

_FILL = 0.45  # share of the enlarged part's longer side that the subject takes
_EDGE = 0.016  # of the picture, by which a place is larger than the cells in which the subject was found


def refined(
    objective: Objective, picture: Image.Image, places: Sequence[Box], which: int, prompt: str, call: Call, *,
    seed: int, timesteps: Sequence[float], like: Tensor, strength: float,
) -> Image.Image:  # fmt: skip
    """The picture with one subject drawn again.

    Args:
        objective: of the pipeline.
        picture: in RGB.
        places: of all subjects, in the whole picture.
        which: of them is drawn again.
        prompt: that names the subject.
        call: draws a picture of the same size with the subject's adapter, and passes the latents of each step on.
        seed: of the noise.
        timesteps: of the call's steps.
        like: latents that the step callback gets, (B, C, H, W) or packed (B, L, C).
        strength: share of the highest noise from which the subject is drawn again.

    Returns:
        A picture of the same size; the same picture where all noise levels after the first step are above `strength`.
    """
    levels = [objective.level_of(timestep) for timestep in timesteps]
    replaced = sum(float(objective.strength(level)) > strength for level in levels[1:])
    if replaced == len(levels) - 1:
        return picture
    around = surroundings(places[which])
    clean = _latents_of(objective, cut(picture, around, picture.size), like)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    boxes = [inside(places[which].grown(_EDGE), around)]
    boxes += [inside(place, around) for k, place in enumerate(places) if k != which and place.overlap(around) > 0]
    mine = latent_masks(boxes, like, picture.size)[0]

    def outside_as_it_is(step: int, latents: Tensor, timestep: float) -> Tensor:
        last = step + 1 == len(levels)
        level_B = levels[step if last else step + 1].to(clean.device)
        known = objective.packed(clean) if last else objective.noised_in_call(clean, noise, level_B)
        return known.to(latents) if step < replaced else torch.where(mine, latents, known.to(latents))

    drawn = call(prompt, seed, outside_as_it_is)
    return covered(picture, drawn, around, boxes)


def surroundings(place: Box) -> Box:
    """The part of the picture, in the picture's proportions, in which a place takes `_FILL` of the longer side."""
    share = min(1.0, max(place.right - place.left, place.bottom - place.top) / _FILL)
    left = min(max(0.0, (place.left + place.right - share) / 2), 1 - share)
    top = min(max(0.0, (place.top + place.bottom - share) / 2), 1 - share)
    return Box(left=left, top=top, right=left + share, bottom=top + share)


def inside(box: Box, around: Box) -> Box:
    """A box of the whole picture as a box of a part of it, as far as it lies there."""
    wide, tall = around.right - around.left, around.bottom - around.top
    return Box(
        left=max(0.0, (box.left - around.left) / wide), top=max(0.0, (box.top - around.top) / tall),
        right=min(1.0, (box.right - around.left) / wide), bottom=min(1.0, (box.bottom - around.top) / tall),
    )  # fmt: skip


@torch.no_grad()
def _latents_of(objective: Objective, part: Image.Image, like: Tensor) -> Tensor:
    """Clean latents (1, C, H, W) of a picture, as many as the call has: fewer where its pictures are enlarged ones."""

    def encoded(picture: Image.Image) -> Tensor:
        return objective.encode_pictures(whole_tensor(picture)[None].to(objective.device)).float()

    clean = encoded(part)
    times = (objective.packed(clean).numel() / like[:1].numel()) ** 0.5
    if times == 1:
        return clean
    size = (round(part.width / times), round(part.height / times))
    return encoded(part.resize(size, Image.Resampling.LANCZOS))
