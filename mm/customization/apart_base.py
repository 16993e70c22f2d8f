"""The picture of the base in which adapters then draw their subjects (`mm.customization.apart`).

Known things stand in for the subjects, so that layout and background are what the base makes of such a prompt.

Legend: B pictures, C channels, H x W latents, L tokens of packed latents.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from mm.core.checks import MAX_SEED, check_text, shown, whole
from mm.core.errors import UserError
from mm.core.nouns import counted, with_article
from mm.customization.batches import hash_of
from mm.customization.captions import names, pattern_of
from mm.customization.objectives.protocol import Objective, objective_of
from mm.customization.places import Box, Noised, between, box_of, cells_of, in_whole
from mm.families.sizes import usual_side

OnLatents = Callable[[int, Tensor, float], Tensor | None]  # step from 0, latents, timestep; gives those to go on with
Call = Callable[[str, int, OnLatents], Image.Image]  # prompt, seed


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What is drawn apart.

    Args:
        prompt: with the words of all subjects.
        words: of the subjects, one an adapter.
        seed: of the noise.
        stand_ins: known things that stand in the place of subjects, by word, best ones of about their shape; those of
            other words are chosen by the seed.
        read: gives a prompt as the model reads it, where the call takes marks that others do not, such as weights.
    """

    prompt: str
    words: Sequence[str]
    seed: int
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[str], str] = field(default=str)

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        whole("seed", self.seed, 0, MAX_SEED)
        here = tuple(word for word in self.words if names(self.prompt, word))
        if not here:
            known = ", ".join(self.words) or "none (give adapters; merged ones have no word of their own)"
            raise UserError(
                f"no adapter's word is in the prompt {self.prompt!r}, so nothing is drawn apart; words: {known}"
            )
        if twice := [word for word in here if len(pattern_of(word).findall(self.prompt)) > 1]:
            raise UserError(f"{twice[0]} is in the prompt {self.prompt!r} more than once; a subject has one place")
        object.__setattr__(self, "words", here)
        object.__setattr__(self, "stand_ins", self._checked_stand_ins())

    def _checked_stand_ins(self) -> dict[str, str]:
        """The stand-ins under the words as the adapters say them; prompts hold these in any case, too."""
        known, found = {word.lower(): word for word in self.words}, dict[str, str]()
        for given, thing in self.stand_ins.items():
            check_text(f"the stand-in of {given}", thing)
            word = known.get(given.lower()) if isinstance(given, str) else None
            if word is None:
                raise UserError(
                    f"{thing!r} is to stand in for {shown(given)}, which is no word of an adapter in the prompt; words "
                    f"in it: {', '.join(self.words)}"
                )
            if self.still_in(thing):
                raise UserError(f"{thing!r} is to stand in for {word} and is itself learned; give a thing of the base")
            for other, same in found.items():
                if other == word or same.lower() == thing.lower():
                    raise UserError(
                        f"{same!r} is to stand in for {other}, and {thing!r} for {given}; give each word another thing"
                    )
            found[word] = thing
        return found

    def still_in(self, text: str) -> bool:
        """Whether a text has one of the words."""
        return any(names(text, word) for word in self.words)

    def read_with(self, things: Mapping[str, str]) -> str:
        """`prompt_with`, as the model reads it."""
        return self.read(self.prompt_with(things))

    def prompt_about(self, word: str) -> str:
        """The prompt, as the model reads it, without what lies between its subjects: one of them alone."""
        text = self.read(self.prompt)
        spots = sorted(found.span() for each in self.words for found in pattern_of(each).finditer(text))
        return f"{text[: spots[0][0]]}{word}{text[spots[-1][1] :]}"

    def prompt_with(self, things: Mapping[str, str]) -> str:
        """The prompt with known things in the place of words, each with the article that it takes."""
        text = self.prompt
        for word, thing in things.items():
            pattern = re.compile(rf"(\ban? +)?{pattern_of(word).pattern}", re.IGNORECASE)
            text = pattern.sub(lambda found, thing=thing: with_article(thing) if found[1] else thing, text)  # type: ignore[misc]
        return text


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """The base's picture: its latents after each step and the steps' timesteps, what stands in for each word and where
    that is in the middle square, and one more thing that it knows."""

    picture: Image.Image
    latents: list[Tensor]
    timesteps: list[float]
    seed: int
    things: dict[str, str]
    other: str
    places: dict[str, Box]

    def without(self, word: str) -> dict[str, str]:
        """What stands in for the other words."""
        return {each: thing for each, thing in self.things.items() if each != word}

    def masks(self, latents: Tensor) -> list[Tensor]:
        """Where each subject is, for latents (B, C, H, W) or packed ones (B, L, C)."""
        boxes = [in_whole(box, *self.picture.size) for box in self.places.values()]
        return latent_masks(boxes, latents, self.picture.size)


def latent_masks(boxes: Sequence[Box], latents: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """The cells of each box, for latents (B, C, H, W) or packed ones (B, L, C) of a picture of this width and height.

    A cell that several boxes cover belongs to the nearest centre.
    """
    inside = cells_of(boxes, *_grid(latents, *size))
    if latents.ndim == 3:
        return [mask_HW.reshape(1, -1, 1).to(latents.device) for mask_HW in inside]
    return [mask_HW.to(latents.device) for mask_HW in inside]


def _grid(latents: Tensor, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of latents; packed ones have the picture's proportions."""
    if latents.ndim != 3:
        return latents.shape[-2], latents.shape[-1]
    tokens = latents.shape[1]
    rows = max(1, round((tokens * height / width) ** 0.5))
    if tokens % rows:
        raise UserError(f"{tokens} tokens of latents are no grid of a picture of {width} x {height}")
    return rows, tokens // rows


def base_picture(objective: Objective, asked: Subjects, call: Call, number: int) -> Base:
    """A picture of the base, with things and noise of its number."""
    seed = asked.seed if not number else hash_of(asked.seed, number) % (MAX_SEED + 1)
    things, other = things_of(objective, asked, number)
    latents: list[Tensor] = []
    timesteps: list[float] = []

    def keep(step: int, given: Tensor | None, timestep: float) -> None:
        if given is None:
            return
        latents.append(given.clone())
        timesteps.append(timestep)

    picture = call(asked.prompt_with(things), seed, keep)
    if not latents:
        raise UserError(
            f"{type(objective.pipe).__name__} gave no latents after its steps; adapters cannot be kept apart"
        )
    places = _places(at_size_of(objective, picture), asked, picture, things, other)
    return Base(
        picture=picture, latents=latents, timesteps=timesteps, seed=seed, things=things, other=other, places=places
    )  # fmt: skip


def at_size_of(objective: Objective, picture: Image.Image) -> Objective:
    """The objective for pictures of this size, or for smaller ones of the family's usual size."""
    side = min(objective.side, *picture.size)
    return objective if side == objective.side else objective_at(objective.pipe, picture.size)


def objective_at(pipe: Any, size: tuple[int, int] | None) -> Objective:
    """The objective of a pipeline for pictures of this width and height, or for smaller ones of its usual size.

    None takes the usual size.
    """
    return objective_of(pipe, None if size is None or min(size) >= usual_side(pipe) else min(size))


def things_of(objective: Objective, asked: Subjects, number: int) -> tuple[dict[str, str], str]:
    """What stands in for each word in a picture of the base, and one more thing, by which the others are found.

    Raises:
        UserError: where the base knows too few things that are not in the prompt.
    """
    rng = random.Random(f"apart {asked.seed} {number}")
    given = [thing.lower() for thing in asked.stand_ins.values()]
    free = [noun for noun in objective.known_nouns() if not _named(asked.prompt, noun) and noun.lower() not in given]
    wanted = len(asked.words) - len(given) + 1
    if len(free) < wanted:
        raise UserError(
            f"{counted(wanted, 'known thing')} would be needed beside the prompt {asked.prompt!r}, and "
            f"{len(free)} {'is' if len(free) == 1 else 'are'} left; give stand-ins"
        )
    drawn = iter(rng.sample(free, wanted))
    return {word: asked.stand_ins.get(word) or next(drawn) for word in asked.words}, next(drawn)


def _named(prompt: str, noun: str) -> bool:
    """Whether a prompt asks for a thing, or for several: of two of them it is not clear which one stands in."""
    several = [f"{noun}s", f"{noun}es", *([f"{noun[:-1]}ies"] if noun.endswith("y") else [])]
    several += [f"{noun[:-1]}ves"] if noun.endswith("f") else []
    return any(names(prompt, each) for each in (noun, *several))


def _places(
    objective: Objective, asked: Subjects, picture: Image.Image, things: dict[str, str], other: str
) -> dict[str, Box]:  # fmt: skip
    """Where what stands in for each word is: where the base would draw otherwise for another thing."""
    noised = Noised.of(objective, picture)
    plain = noised.predictions(asked.read_with(things))
    found = {}
    for word in asked.words:
        otherwise = noised.predictions(asked.read_with(things | {word: other}))
        found[word] = box_of(between(plain, otherwise))
    return found
