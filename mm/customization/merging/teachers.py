"""What a merged adapter is trained on: predictions of each adapter on its own prompts, and pictures of two subjects.

Design choices
- A target is a noised latent, its noise level, a prompt, and what is to be predicted there. The targets of an adapter
  are its own predictions along pictures that it drew, so that no training pictures are needed. Those of the base, on
  prompts without any of the words, keep what it draws.
- Pictures of two subjects are made as those beside known things are (`mm.customization.companions`): the base draws two
  known things, and both are covered by subjects cut out of pictures that their adapters drew. The target is what each
  adapter predicts at the place of its subject, and what the base predicts elsewhere (as Gu et al. 2023, Mix-of-Show,
  arXiv 2305.18292, let each adapter draw a region of its own). The true noise would be as good on average, and hide
  the small differences between adapters in its variance.
- A part of the targets of an adapter has the empty prompt, with which guidance compares.

Legend: M targets, B batch, C channels, H x W latents.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mm.adapters.acting import acting
from mm.adapters.patch import Patch
from mm.customization.batches import hash_of
from mm.customization.companions import pasted
from mm.customization.data import Example, to_tensor
from mm.customization.merging.regmean import OnProgress, other_prompts, own_prompts
from mm.customization.objectives.protocol import Objective
from mm.customization.places import Box, are_apart, cells, drawn_box, fitted, subject_box
from mm.customization.previews import draw

TOGETHER = (
    "a {} and a {}", "a {} next to a {}", "a {} left of a {}", "a {} right of a {}", "a {} above a {}",
    "a {} below a {}",
)  # fmt: skip
_NOISES = 16  # targets of each drawn picture
_EMPTY = 0.2  # share of them with the empty prompt, where the noise leaves the picture visible
_VISIBLE = 0.6  # share of the highest noise below which it does
_ALONE = 4  # the first of an adapter's own prompts name its subject alone
_TRIES = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """Targets of one teacher.

    Attributes:
        noisy: latents (M, C, H, W).
        level_M: noise levels.
        prompts: M of them.
        wanted: predictions (M, C, H, W).
    """

    noisy: Tensor
    level_M: Tensor
    prompts: tuple[str, ...]
    wanted: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A picture that a teacher drew."""

    prompt: str
    picture: Image.Image


@dataclass(frozen=True, kw_only=True, eq=False)
class Together:
    """A picture of two subjects.

    Attributes:
        picture: the base's, with both subjects over two known things.
        caption: with both words.
        plain: the prompt with two known things, which the base has drawn.
        names: numbers of the adapters.
        prompts: of each adapter, with its word and the known thing in the place of the other subject.
        places: of the subjects.
    """

    picture: Image.Image
    caption: str
    plain: str
    names: tuple[int, int]
    prompts: tuple[str, str]
    places: tuple[Box, Box]


class Teachers:
    """Draws with each adapter, and computes the targets.

    Args:
        objective: its pipeline has no patch on it; it is unchanged afterwards.
        patches: the adapters.
        words: what each is called in prompts.
        weights: how strongly each acts.
        seed: of all that is drawn.
        steps: of sampling; None takes the pipeline's own.
        progress: called with a share and a text.

    Attributes:
        own: targets by adapter.
        other: those of the base.
        drawn: pictures by adapter.
    """

    def __init__(
        self, objective: Objective, patches: Sequence[Patch], words: Sequence[str], weights: Sequence[float], *,
        seed: int, steps: int | None = None, progress: OnProgress = lambda share, text: None,
    ) -> None:  # fmt: skip
        self.objective, self.words, self.seed, self.steps = objective, list(words), seed, steps
        self.patches, self.weights = list(patches), list(weights)
        self.own: list[Targets] = []
        self.drawn: list[list[Drawn]] = []
        self.other = self._of(None, 1.0, other_prompts(objective.pipe), 0, progress)[0]
        for number, (patch, word, weight) in enumerate(zip(patches, words, weights, strict=True), 1):
            targets, drawn = self._of(patch, weight, own_prompts(objective, word), number, progress)
            self.own.append(targets)
            self.drawn.append(drawn)

    @torch.no_grad()
    def _of(
        self, patch: Patch | None, weight: float, prompts: Sequence[str], number: int, progress: OnProgress
    ) -> tuple[Targets, list[Drawn]]:
        """The targets of a teacher, and what it drew."""
        objective, drawn, parts = self.objective, [], []
        generator = torch.Generator().manual_seed(hash_of(self.seed, number))
        with acting(objective.pipe, patch, weight):
            for k, prompt in enumerate(prompts):
                progress(number / (len(self.words) + 1), f"drawing {prompt!r}")
                picture = draw(objective.pipe, prompt, side=objective.side, seed=self.seed + k, steps=self.steps)
                drawn.append(Drawn(prompt=prompt, picture=picture.convert("RGB")))
                parts.append(self._along(drawn[-1], generator))
        return joined(parts), drawn

    def _along(self, drawn: Drawn, generator: torch.Generator) -> Targets:
        """Predictions of the model as it is, along a picture that it drew."""
        objective = self.objective
        clean = encoded(objective, drawn.picture).expand(_NOISES, -1, -1, -1)
        level_B = objective.levels(_NOISES, generator)
        noise = torch.randn(clean.shape, generator=generator)
        empty = (torch.rand(_NOISES, generator=generator) < _EMPTY) & (objective.strength(level_B) < _VISIBLE)
        prompts = tuple("" if bare else drawn.prompt for bare in empty.tolist())
        device = objective.device
        noisy = objective.noised(clean.to(device), noise.to(device), level_B.to(device))
        wanted = objective.predict(noisy, level_B.to(device), objective.encode_prompts(prompts))
        return Targets(noisy=noisy.cpu(), level_M=level_B, prompts=prompts, wanted=wanted.cpu())

    def pairs(self, each: int, progress: OnProgress = lambda share, text: None) -> list[Together]:
        """Pictures of two subjects, so that each subject is in about `each` of them; fewer where they overlap."""
        rng = random.Random(f"pairs {self.seed}")
        boxes: dict[tuple[int, int], Box] = {}
        made: list[Together] = []
        order = list(combinations(range(len(self.words)), 2))
        rng.shuffle(order)
        wanted = max(1, round(each * len(self.words) / 2))
        for number in range(wanted):
            progress(number / wanted, f"picture {number + 1} of {wanted} with two subjects")
            one, other = order[number % len(order)]
            found = self._pair((one, other) if number % 2 else (other, one), boxes, rng)
            if found is not None:
                made.append(found)
        return made

    def _pair(
        self, names: tuple[int, int], boxes: dict[tuple[int, int], Box], rng: random.Random
    ) -> Together | None:  # fmt: skip
        """A picture of two adapters' subjects."""
        objective, form = self.objective, TOGETHER[rng.randrange(len(TOGETHER))]
        if objective.unknown(form.format("", ""), ""):
            form = TOGETHER[0]
        words = [self.words[k] for k in names]
        for _ in range(_TRIES):
            one, other, third = rng.sample(list(objective.known_nouns()), 3)
            plain = form.format(one, other)
            drawn = draw(objective.pipe, plain, side=objective.side, seed=rng.randrange(2**31), steps=self.steps)
            picture, places = drawn.convert("RGB"), []
            for k, without in zip(names, (form.format(third, other), form.format(one, third)), strict=True):
                shown = rng.randrange(min(_ALONE, len(self.drawn[k])))
                source = self.drawn[k][shown]
                if (k, shown) not in boxes:
                    boxes[k, shown] = self._subject(source, self.words[k])
                place = fitted(boxes[k, shown], drawn_box(objective, drawn, plain, without))
                picture = pasted(picture, source.picture, boxes[k, shown], place)
                places.append(place)
            if are_apart(places):
                prompts = (form.format(words[0], other), form.format(one, words[1]))
                return Together(
                    picture=picture, caption=form.format(*words), plain=plain, names=names, prompts=prompts,
                    places=(places[0], places[1]),
                )  # fmt: skip
        return None

    @torch.no_grad()
    def of_pairs(self, pairs: Sequence[Together]) -> Targets | None:
        """The targets of pictures of two subjects; None for no pictures."""
        if not pairs:
            return None
        objective, device = self.objective, self.objective.device
        generator = torch.Generator().manual_seed(hash_of(self.seed, 2**20))
        parts = []
        for pair in pairs:
            clean = encoded(objective, pair.picture).expand(_NOISES, -1, -1, -1)
            level_B, noise = objective.levels(_NOISES, generator), torch.randn(clean.shape, generator=generator)
            noisy = objective.noised(clean, noise, level_B)
            condition = objective.encode_prompts([pair.plain] * _NOISES)
            wanted = objective.predict(noisy.to(device), level_B.to(device), condition).cpu()
            captions = (pair.caption,) * _NOISES
            parts.append(Targets(noisy=noisy, level_M=level_B, prompts=captions, wanted=wanted))
        for number, (patch, weight) in enumerate(zip(self.patches, self.weights, strict=True)):
            with acting(objective.pipe, patch, weight):
                for pair, part in zip(pairs, parts, strict=True):
                    if number in pair.names:
                        self._own_part(pair, pair.names.index(number), part)
        return joined(parts)

    def _own_part(self, pair: Together, at: int, part: Targets) -> None:
        """Puts what the adapter that is on predicts at the place of its subject into the targets."""
        objective, device = self.objective, self.objective.device
        condition = objective.encode_prompts([pair.prompts[at]] * len(part))
        given = objective.predict(part.noisy.to(device), part.level_M.to(device), condition).cpu()
        inside_HW = cells(pair.places[at], part.noisy.shape[-2], part.noisy.shape[-1])
        part.wanted[..., inside_HW] = given[..., inside_HW]

    def _subject(self, source: Drawn, word: str) -> Box:
        example = Example(path=Path("drawn.png"), caption=source.prompt, picture=source.picture)
        return subject_box(self.objective, example, word, self.objective.known_nouns()[0])


def encoded(objective: Objective, picture: Image.Image) -> Tensor:
    """Latents (1, C, H, W) of a picture, on the CPU."""
    return objective.encode_pictures(to_tensor(picture, objective.side)[None].to(objective.device)).float().cpu()


def joined(parts: Sequence[Targets]) -> Targets:
    """Targets in a row."""
    return Targets(
        noisy=torch.cat([part.noisy for part in parts]), level_M=torch.cat([part.level_M for part in parts]),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        wanted=torch.cat([part.wanted for part in parts]),
    )  # fmt: skip
