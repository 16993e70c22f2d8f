"""Training pictures of the subject beside something known, made of the user's and of what the base draws.

A subject that is only ever shown alone takes the place of everything else, or loses its own, where a prompt asks for
it beside another thing. Pictures of both teach where each belongs (Han et al. 2023, SVDiff, arXiv 2303.11305, whose
pictures are halves of two; Kumari et al. 2022, arXiv 2212.04488, train two subjects together).

Design choices
- The base draws two known things under the user's own caption, so that layout and background are what it makes of such
  a prompt. The subject, cut out of a picture of the user's, then covers one of the two.
- Boxes need no segmentation. A known thing is where the base's predictions for two prompts differ (Couairon et al.
  2022, DiffEdit, arXiv 2210.11427), and the unknown subject where the base's prediction is wrong. A mask of the user's
  says it better, and is used where there is one.
- Everything is drawn from seeds, so that a run that was stopped makes the same pictures again.

Legend: B noises, C channels, H x W latents, S side of the pictures.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.customization.captions import renamed as replaced
from mm.customization.data import Example, to_tensor
from mm.customization.objectives.protocol import Objective
from mm.customization.previews import draw

_LEVELS = 8  # noise levels, of which the middle ones are used
_INSIDE = 0.4  # of the highest value, from which a cell belongs to a box
_TRIES = 4  # drawings for each picture, until the two things are apart
_WORDS = 3
_LARGEST = 0.45  # area of a thing beside another one
_SHARED = 0.2  # of the smaller box, that two things may share
_EDGE = 0.02  # of the side, over which a box fades


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


def companions(
    objective: Objective, examples: Sequence[Example], *, name: str, noun: str, count: int, seed: int,
    steps: int | None = None, progress: Callable[[float, str], None] = lambda share, text: None,
) -> list[Example]:  # fmt: skip
    """Up to `count` pictures of the subject beside something known.

    Args:
        objective: of the base, without what is trained.
        examples: the user's pictures.
        name: of the subject, in their captions.
        noun: its class; "" where it is not known.
        count: of pictures; there are fewer where the two would overlap, and a warning where there are none.
        seed: of nouns and drawings.
        steps: of sampling.
        progress: called with 0, since nothing is trained yet, and a text.
    """
    if not count:
        return []
    rng = random.Random(f"companions {seed}")
    known = [word for word in objective.known_nouns() if word != noun]
    if len(known) < _WORDS:
        raise UserError(
            f"{counted(len(known), 'thing')} {'is' if len(known) == 1 else 'are'} known beside "
            f"{noun!r}, and {_WORDS} are needed; give companions=0"
        )
    boxes: dict[int, Box] = {}
    made: list[Example] = []
    for number in range(count):
        progress(0.0, f"companion {number + 1} of {count}")
        at = number % len(examples)
        example = examples[at]
        if at not in boxes:
            boxes[at] = subject_box(objective, example, name, noun or known[0])
        for _ in range(_TRIES):
            words = rng.sample(known, 3)
            found = _beside(objective, example, boxes[at], name, noun, words, number, rng.randrange(2**31), steps)
            if found is not None:
                made.append(found)
                break
    if not made:
        warnings.warn(
            "the base drew nothing that stays free of the subject, so it is learned alone; companions=0 skips this",
            stacklevel=3,
        )
    return made


def _beside(
    objective: Objective, example: Example, box: Box, name: str, noun: str, words: Sequence[str], number: int,
    seed: int, steps: int | None,
) -> Example | None:  # fmt: skip
    """A picture of the subject beside something known; None where the two would overlap.

    `words`: what is drawn in the subject's place, what is beside it, and a third thing, which finds where both are.
    """
    stand_in, other, third = words
    text = beside(example.caption, name, noun, other, first=number % 2 == 0)
    prompt = renamed(text, name, noun, stand_in)
    drawn = draw(objective.pipe, prompt, side=objective.side, seed=seed, steps=steps)
    place = drawn_box(objective, drawn, prompt, renamed(text, name, noun, third))
    beside_it = drawn_box(
        objective, drawn, prompt,
        renamed(beside(example.caption, name, noun, third, first=number % 2 == 0), name, noun, stand_in),
    )  # fmt: skip
    place = fitted(box, place)
    if place.area >= _LARGEST or place.overlap(beside_it) >= _SHARED:
        return None
    path = Path(f"{example.path.stem}-{other}-{number}.png")
    return Example(path=path, caption=text, picture=pasted(drawn.convert("RGB"), example.picture, box, place))


def balanced(examples: Sequence[Example], made: Sequence[Example]) -> list[Example]:
    """All examples, the user's first, and repeated so that they are two of three at least."""
    own = sum(example.repeats for example in examples)
    times = max(1, math.ceil(2 * len(made) / own))
    return [*(replace(example, repeats=times * example.repeats) for example in examples), *made]


def beside(caption: str, name: str, noun: str, other: str, *, first: bool) -> str:
    """A caption that names another thing too, before or behind the subject."""
    known = f"{'an' if other[:1] in 'aeiou' else 'a'} {other}"
    subject = re.compile(rf"(?:\b(?:an?|the)\s+)?{re.escape(name)}(?:\s+{re.escape(noun)}\b)?" if noun else
                         rf"(?:\b(?:an?|the)\s+)?{re.escape(name)}")  # fmt: skip
    found = subject.search(caption)
    if found is None:
        return f"{caption}, {known}"
    both = f"{found[0]} and {known}" if first else f"{known} and {found[0]}"
    return f"{caption[: found.start()]}{both}{caption[found.end() :]}"


def renamed(caption: str, name: str, noun: str, other: str) -> str:
    """A caption with another word in the subject's place."""
    whole = f"{name} {noun}" if noun and f"{name} {noun}" in caption else name
    return replaced(caption, whole, other)


# ---- where things are ------------------------------------------------------------------------------------------------


def subject_box(objective: Objective, example: Example, name: str, noun: str) -> Box:
    """Where the subject is: the mask's box, or where the base is wrong about the picture."""
    if example.mask is not None:
        found = example.mask.convert("L").point([0] * 128 + [255] * 128).getbbox()
        if found is not None:
            width, height = example.mask.size
            left, top, right, bottom = found
            return Box(left=left / width, top=top / height, right=right / width, bottom=bottom / height)
    return box_of(_differences(objective, example.picture, renamed(example.caption, name, "", noun), None))


def drawn_box(objective: Objective, picture: Image.Image, caption: str, other: str) -> Box:
    """Where what a caption names is: where the base's predictions for it and for another caption differ."""
    return box_of(_differences(objective, picture, caption, other))


@torch.no_grad()
def _differences(objective: Objective, picture: Image.Image, caption: str, other: str | None) -> Tensor:
    """Mean squares (H, W) of the differences, at the middle noise levels."""
    clean = objective.encode_pictures(to_tensor(picture.convert("RGB"), objective.side)[None].to(objective.device))
    level_B = objective.fixed_levels(_LEVELS)[_LEVELS // 4 : 3 * _LEVELS // 4].to(objective.device)
    clean = clean.float().expand(len(level_B), *clean.shape[1:])
    total = torch.zeros(clean.shape[-2:], device=clean.device)
    for seed in range(2):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
        noisy = objective.noised(clean, noise, level_B)
        given = objective.predict(noisy, level_B, objective.encode_prompts([caption] * len(level_B)))
        if other is None:
            wanted = objective.target(clean, noise, level_B)
        else:
            wanted = objective.predict(noisy, level_B, objective.encode_prompts([other] * len(level_B)))
        total += (given - wanted).square().mean((0, 1))
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


def pasted(onto: Image.Image, picture: Image.Image, box: Box, place: Box) -> Image.Image:
    """A picture in which the box of another one is at a place, with soft edges."""
    left, top, right, bottom = _pixels(place, *onto.size)
    cut = picture.convert("RGB").crop(_pixels(box, *picture.size))
    above = onto.copy()
    above.paste(cut.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
    mask = Image.new("L", onto.size, 0)
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return Image.composite(above, onto, mask.filter(ImageFilter.GaussianBlur(_EDGE * onto.width)))


def _pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    sides = (box.left * width, box.top * height, box.right * width, box.bottom * height)
    left, top, right, bottom = (round(x) for x in sides)
    return left, top, max(right, left + 1), max(bottom, top + 1)
