"""What a run learns of a batch: the pictures under their captions, edits of source pictures, or a direction.

Design choices
- A goal turns noised pictures into one error a picture. The loop around it (rates, preservation, previews, state) is
  the same for all.
- An edit's unrelated instructions are held to the base on the same sources.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.data import to_tensor
from mm.customization.methods.protocol import Learner
from mm.customization.objectives.protocol import weighted_mse
from mm.customization.sliders import SliderPrompts


@dataclass(frozen=True, kw_only=True, eq=False)
class Noised:
    """Pictures at a noise level, on the objective's device.

    Attributes:
        chosen: numbers of the examples.
        bare: which are learned without their caption.
        clean: latents (B, C, H, W).
        noise: the same shape.
        level_B: noise levels.
        mask: (B, 1, H, W) where the loss counts; None counts everywhere.
        number: of the step; None in a preview.
    """

    chosen: Sequence[int]
    bare: Sequence[bool]
    clean: Tensor
    noise: Tensor
    level_B: Tensor
    mask: Tensor | None
    number: int | None = None


class Goal:
    """The pictures, under their captions."""

    drops_captions = True

    def __init__(self, learner: Learner) -> None:
        self.learner, self.objective = learner, learner.job.objective

    def errors(self, noised: Noised) -> Tensor:
        """One error (B,) a picture."""
        objective = self.objective
        captions = self.learner.captions(noised.chosen)
        words = ["" if bare else caption for bare, caption in zip(noised.bare, captions, strict=True)]
        condition = self.condition(words, noised.chosen)
        latents = objective.noised(noised.clean, noised.noise, noised.level_B)
        given = objective.predict(latents, noised.level_B, condition)
        return weighted_mse(given, objective.target(noised.clean, noised.noise, noised.level_B), noised.mask)

    def condition(self, words: Sequence[str], chosen: Sequence[int]) -> Any:
        """What the denoiser reads of prompts, beside the examples with these numbers."""
        return self.objective.conditions(words)

    @contextmanager
    def acting(self, number: int) -> Iterator[None]:
        """Within the context the adapter acts as it does in a step."""
        yield


class EditGoal(Goal):
    """The second picture of each pair, given the first and the instruction.

    Captions are never left out: guidance compares with the source alone, which must stay what the base makes of it.
    """

    drops_captions = False

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner)
        objective = self.objective
        sources = [e.before for e in learner.job.examples if e.before is not None]
        if len(sources) != len(learner.job.examples):
            raise UserError("an edit is learned from pairs; give each picture its source")
        self.pictures = torch.stack([to_tensor(source, objective.side) for source in sources])
        with torch.no_grad():
            self.latents = torch.cat([objective.encode_pictures(one[None]).cpu() for one in self.pictures])

    def condition(self, words: Sequence[str], chosen: Sequence[int]) -> Any:
        index, device = torch.tensor(list(chosen)), self.objective.device
        pictures, latents = self.pictures[index].to(device), self.latents[index].to(device)
        return self.objective.edit_conditions(words, pictures, latents, chosen)


class SliderGoal(Goal):
    """The direction between two prompts: at scale s the neutral prompt gives v + s strength (v_positive - v_negative).

    Source: Gandikota et al. 2023, arXiv 2311.12092. All three predictions on the right are the frozen base's. The
    formula is the same for the velocity, epsilon and v, which are linear in each other. Both signs
    are trained, in turn.
    """

    drops_captions = False

    def __init__(self, learner: Learner, prompts: SliderPrompts) -> None:
        super().__init__(learner)
        learner.check_scales()
        self.triples = prompts.triples()
        self.strength = prompts.strength

    def errors(self, noised: Noised) -> Tensor:
        signs = (1, -1) if noised.number is None else (_sign(noised.number),)
        objective, level_B = self.objective, noised.level_B
        latents = objective.noised(noised.clean, noised.noise, level_B)
        words = [self.triples[k % len(self.triples)] for k in noised.chosen]
        with torch.no_grad(), self.learner.off():
            neutral, plus, minus = (
                objective.predict(latents, level_B, objective.conditions([w[k] for w in words])) for k in range(3)
            )
        errors = []
        for sign in signs:
            with self.learner.at(sign):
                given = objective.predict(latents, level_B, objective.conditions([w[0] for w in words]))
            errors.append(weighted_mse(given, neutral + sign * self.strength * (plus - minus), noised.mask))
        return torch.stack(errors).mean(0)

    @contextmanager
    def acting(self, number: int) -> Iterator[None]:
        with self.learner.at(_sign(number)):
            yield


def _sign(number: int) -> int:
    # Preservation comes every second step by default: in twos, so that it meets both signs.
    return 1 if (number // 2) % 2 == 0 else -1


def goal_of(learner: Learner, prompts: SliderPrompts | None) -> Goal:
    """The goal of a job's kind."""
    if learner.job.kind == "edit":
        return EditGoal(learner)
    if learner.job.kind == "slider":
        assert prompts is not None
        return SliderGoal(learner, prompts)
    return Goal(learner)
