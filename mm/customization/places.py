"""Where things are in pictures, as boxes: found by what the model predicts, without segmentation.

Design choices
- A known thing is where the base's predictions for two prompts differ (Couairon et al. 2022, DiffEdit, arXiv
  2210.11427), and an unknown subject where the base's prediction is wrong. A mask of the user's says it better, and is
  used where there is one.

Legend: B noise levels, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mm.customization.captions import renamed
from mm.customization.data import Example, to_tensor
from mm.customization.objectives.protocol import Objective

_LEVELS = 8  # noise levels, of which the middle ones are used
_NOISES = 2
_INSIDE = 0.4  # of the highest value, from which a cell belongs to a box
_LARGEST = 0.45  # area of a thing beside another one
_SHARED = 0.2  # of the smaller box, that two things may share


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box as shares of the sides, from 0 to 1."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Share of the picture."""
        return (self.right - self.left) * (self.bottom - self.top)

    def overlap(self, other: Box) -> float:
        """What two boxes share, as a share of the smaller one."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        tall = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, tall) / min(self.area, other.area)

    def grown(self, edge: float) -> Box:
        """The box with an edge around it, within the picture."""
        return Box(
            left=max(0.0, self.left - edge), top=max(0.0, self.top - edge), right=min(1.0, self.right + edge),
            bottom=min(1.0, self.bottom + edge),
        )  # fmt: skip

    @property
    def edges(self) -> int:
        """How many edges of the picture it touches, which may cut off what it holds."""
        return sum((self.left <= 0, self.top <= 0, self.right >= 1, self.bottom >= 1))


def are_apart(boxes: Sequence[Box], sizes: Sequence[Box] | None = None) -> bool:
    """Whether things leave each other their places: none is too large, and no two share much.

    Args:
        boxes: of the things.
        sizes: those whose size counts; None: all.
    """
    small = all(box.area < _LARGEST for box in (boxes if sizes is None else sizes))
    return small and all(one.overlap(other) < _SHARED for one, other in combinations(boxes, 2))


def cells(box: Box, height: int, width: int) -> Tensor:
    """The cells (H, W) of a grid whose centres are in a box; the nearest one where there are none."""
    down = (torch.arange(height) + 0.5) / height
    right = (torch.arange(width) + 0.5) / width
    rows, columns = (down >= box.top) & (down <= box.bottom), (right >= box.left) & (right <= box.right)
    for inside, centres, middle in (
        (rows, down, (box.top + box.bottom) / 2), (columns, right, (box.left + box.right) / 2),
    ):  # fmt: skip
        if not inside.any():
            inside[(centres - middle).abs().argmin()] = True
    return rows[:, None] & columns


def cells_of(boxes: Sequence[Box], height: int, width: int) -> list[Tensor]:
    """The cells (H, W) of each box; one that several boxes cover belongs to the nearest centre."""
    inside_NHW = torch.stack([cells(box, height, width) for box in boxes])
    down_H1 = ((torch.arange(height) + 0.5) / height)[:, None]
    right_W = (torch.arange(width) + 0.5) / width
    far_NHW = torch.stack(
        [
            (down_H1 - (box.top + box.bottom) / 2).square() + (right_W - (box.left + box.right) / 2).square()
            for box in boxes
        ]
    )
    nearest_HW = far_NHW.masked_fill(~inside_NHW, torch.inf).argmin(0)
    return [inside & (nearest_HW == k) for k, inside in enumerate(inside_NHW)]


def in_whole(box: Box, width: int, height: int) -> Box:
    """A box of a picture's middle square, as a box of the whole picture."""
    side = min(width, height)
    across, down = side / width, side / height
    return Box(
        left=box.left * across + (1 - across) / 2, top=box.top * down + (1 - down) / 2,
        right=box.right * across + (1 - across) / 2, bottom=box.bottom * down + (1 - down) / 2,
    )  # fmt: skip


def share_inside(differences_HW: Tensor, box: Box) -> float:
    """Share of the differences that lies in a box, from 0 to 1."""
    inside = differences_HW[cells(box, *differences_HW.shape)].sum()
    return float(inside / differences_HW.sum().clamp_min(1e-30))


def subject_box(objective: Objective, example: Example, name: str, noun: str) -> Box:
    """Where the subject is: the mask's box, or where the base is wrong about the picture."""
    if example.mask is not None:
        found = example.mask.convert("L").point([0] * 128 + [255] * 128).getbbox()
        if found is not None:
            width, height = example.mask.size
            left, top, right, bottom = found
            return Box(left=left / width, top=top / height, right=right / width, bottom=bottom / height)
    noised = Noised.of(objective, example.picture)
    return box_of(between(noised.predictions(renamed(example.caption, name, noun)), noised.targets()))


def drawn_box(objective: Objective, picture: Image.Image, caption: str, other: str) -> Box:
    """Where what a caption names is: where the base's predictions for it and for another caption differ."""
    noised = Noised.of(objective, picture)
    return box_of(between(noised.predictions(caption), noised.predictions(other)))


def middle_levels(objective: Objective) -> Tensor:
    """The noise levels at which predictions are compared. Raises UserError for a scheduler that has none."""
    return objective.fixed_levels(_LEVELS)[_LEVELS // 4 : 3 * _LEVELS // 4]


@dataclass(frozen=True, kw_only=True, eq=False)
class Noised:
    """A picture with several noises, each at the middle noise levels: what predictions about it are compared on.

    Attributes:
        objective: of the model as it is.
        clean: latents of the picture's middle square, one row a level.
        level_B: the levels.
        noises: as many as there are predictions of a caption.
    """

    objective: Objective
    clean: Tensor
    level_B: Tensor
    noises: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, objective: Objective, picture: Image.Image) -> Noised:
        """The middle square of a picture, encoded once."""
        clean = objective.encode_pictures(to_tensor(picture.convert("RGB"), objective.side)[None].to(objective.device))
        level_B = middle_levels(objective).to(objective.device)
        clean = clean.float().expand(len(level_B), *clean.shape[1:])
        generators = (torch.Generator().manual_seed(seed) for seed in range(_NOISES))
        noises = tuple(torch.randn(clean.shape, generator=generator).to(clean) for generator in generators)
        return cls(objective=objective, clean=clean, level_B=level_B, noises=noises)

    @torch.no_grad()
    def predictions(self, caption: str) -> list[Tensor]:
        """What the model predicts under a caption, (B, C, H, W) a noise."""
        read = self.objective.encode_repeated(caption, len(self.level_B))
        noisy = (self.objective.noised(self.clean, noise, self.level_B) for noise in self.noises)
        return [self.objective.predict(each, self.level_B, read) for each in noisy]

    def targets(self) -> list[Tensor]:
        """What is to be predicted, (B, C, H, W) a noise."""
        return [self.objective.target(self.clean, noise, self.level_B) for noise in self.noises]


def between(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Mean squares (H, W) of the differences between predictions, summed over noises."""
    total = torch.zeros(first[0].shape[-2:], device=first[0].device)
    for one, other in zip(first, second, strict=True):
        total += (one - other).square().mean((0, 1))
    return total.cpu()


def box_of(differences_HW: Tensor) -> Box:
    """The box of what stands out; its edges lie between cells."""
    smooth = F.avg_pool2d(F.pad(differences_HW[None, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0, 0]
    low, high = smooth.median(), smooth.max()
    inside = smooth >= low + _INSIDE * (high - low)
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    height, width = differences_HW.shape
    return Box(
        left=int(columns[0]) / width, top=int(rows[0]) / height, right=(int(columns[-1]) + 1) / width,
        bottom=(int(rows[-1]) + 1) / height,
    )  # fmt: skip


def fitted(box: Box, place: Box) -> Box:
    """The box of the same shape that covers a place, within the picture."""
    wide, tall = box.right - box.left, box.bottom - box.top
    scale = max((place.right - place.left) / wide, (place.bottom - place.top) / tall)
    wide, tall = min(1.0, wide * scale), min(1.0, tall * scale)
    left = min(max(0.0, (place.left + place.right - wide) / 2), 1 - wide)
    top = min(max(0.0, (place.top + place.bottom - tall) / 2), 1 - tall)
    return Box(left=left, top=top, right=left + wide, bottom=top + tall)
