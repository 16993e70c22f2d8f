"""Training pictures of the subject beside something known, made of the user's and of what the base draws.

A subject that is only ever shown alone takes the place of everything else, or loses its own, where a prompt asks for
it beside another thing. Pictures of both teach where each belongs (Han et al. 2023, SVDiff, arXiv 2303.11305, whose
pictures are halves of two; Kumari et al. 2022, arXiv 2212.04488, train two subjects together).

Design choices
- The base draws two known things under the user's own caption, so that layout and background are what it makes of such
  a prompt. The subject, cut out of a picture of the user's, then covers one of the two.
- Where things are is found without segmentation (`mm.customization.places`).
- Everything is drawn from seeds, so that a run that was stopped makes the same pictures again.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.customization.captions import renamed as replaced
from mm.customization.cutouts import pasted
from mm.customization.data import Example
from mm.customization.objectives.protocol import Objective
from mm.customization.places import Box, are_apart, drawn_box, fitted, subject_box
from mm.customization.previews import draw

_TRIES = 4  # drawings for each picture, until the two things are apart
_WORDS = 3


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
    if not are_apart([place, beside_it], sizes=[place]):
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
