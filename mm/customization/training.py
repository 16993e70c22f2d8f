"""The loop: an adapter learns the pictures while unrelated prompts keep what the frozen base makes of them.

Design choices
- Preservation needs no pictures: on unrelated prompts (the family's own, the subject's class, and none) the prediction
  is held to the base's own, which is computed in the same step with the adapter off.
- The whole state lies in one file (`mm.customization.run_state`). Steps depend on (seed, number) alone, so a run that
  was killed at any moment continues to the same bits.
- The preview score is that of held noise: what the error on the pictures has lost, less what unrelated prompts have
  moved, both as shares of what the base has. The best values are kept, and a run without progress stops.

Legend: B pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.batches import Batches, Step
from mm.customization.config import TrainingConfig
from mm.customization.goals import Goal, Noised
from mm.customization.methods.protocol import Learner
from mm.customization.objectives.protocol import Objective, weighted_mse
from mm.customization.run_state import STATE, Kept, Progress
from mm.customization.strangers import Strangers

_SCORED = 8  # noise levels of a preview
_SCORED_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Regularization:
    """Pictures of the class, learned under their own captions (prior preservation of Ruiz et al. 2022, 2208.12242).

    Attributes:
        batches: of the pictures.
        captions: of each.
    """

    batches: Batches
    captions: Sequence[str]

    def loss(self, objective: Objective, number: int) -> Tensor:
        """Of a step."""
        step, device = self.batches.step(number), objective.device
        clean = self.batches.latents[torch.tensor(step.chosen)].to(device)
        noise, level_B = step.noise.to(device), step.level_B.to(device)
        condition = objective.conditions([self.captions[i] for i in step.chosen])
        given = objective.predict(objective.noised(clean, noise, level_B), level_B, condition)
        return weighted_mse(given, objective.target(clean, noise, level_B), None).mean()


class Training:
    """One run.

    Args:
        learner: what is trained, on the model.
        batches: the pictures.
        prompts: what is to stay as the base has it.
        config: how long and how fast.
        goal: what is learned of a batch; None learns the pictures under their captions.
        guarded: further prompts that are to stay, with a weight of their own.
        strangers: prompts with other new words that are to stay; None for none.
        regularization: pictures of the class, learned under their own captions; None for none.
        work: folder of the state; None keeps none.
        identity: what the state belongs to; another run's state is refused.
    """

    def __init__(
        self, learner: Learner, batches: Batches, prompts: Sequence[str], config: TrainingConfig, *,
        goal: Goal | None = None, guarded: Sequence[str] = (), strangers: Strangers | None = None,
        regularization: Regularization | None = None,
        work: Path | None = None, identity: str = "",
    ) -> None:  # fmt: skip
        self.learner, self.batches, self.prompts, self.config = learner, batches, list(prompts), config
        self.guarded, self.regularization = list(guarded), regularization
        self.strangers = strangers
        self.objective = learner.job.objective
        self.goal = goal if goal is not None else Goal(learner)
        self.parameters = learner.parameters()
        self.state_file = None if work is None else work / STATE
        self.identity = identity
        self.progress = Progress()
        rows = learner.rows()
        plain = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        groups: list[dict[str, Any]] = [
            {"params": [value]} | ({"lr": config.row_rate * rows[name], "weight_decay": 0.0} if name in rows else plain)
            for name, value in self.parameters.items()
        ]
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), foreach=False)
        self.best = self._copy()
        self._base_scores: tuple[Tensor, Tensor] | None = None
        for part in () if work is None else work.glob(f".{STATE}.*.part"):
            part.unlink(missing_ok=True)  # of a save during which the run was killed
        if self.state_file is not None and self.state_file.is_file():
            self.progress = self._kept().read(self.state_file, self.identity)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self, on_step: Callable[[Progress], None], on_preview: Callable[[Progress], None]) -> None:
        """Trains to the end, or until previews no longer improve; the model holds the best values afterwards."""
        config = self.config
        if not self.progress.scores:
            self._preview(on_preview)
        while self.progress.step < config.steps and not self.progress.stopped:
            self.train_step(self.batches.step(self.progress.step))
            on_step(self.progress)
            if self.progress.step % config.preview_every == 0 or self.progress.step == config.steps:
                self._preview(on_preview)
            if self.progress.step % config.save_every == 0 or self.progress.stopped:
                self.save()
        self.save()
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(self.best[name])
        self.learner.settle()

    def train_step(self, step: Step) -> None:
        """One update."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._factor()
        self.optimizer.zero_grad(set_to_none=True)
        with self.goal.acting(self.progress.step):  # blocks that are computed again run in the gradient's pass, too
            loss = self.loss(step)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise UserError(
                    f"the loss is {value} at step {self.progress.step}; give a lower learning_rate, now "
                    f"{self.config.learning_rate:g}"
                )
            loss.backward()
        self.progress.losses.append(value)
        kept = self.prompts or (self.guarded and self.config.guard_weight)
        held = kept and self.config.preserve and self.progress.step % self.config.preserve_every == 0
        self.progress.preserved.append(self._preserve(step) if held else (self.progress.preserved or [0.0])[-1])
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.optimizer.step()
        self.learner.after_step(self.progress.step)
        self.progress.step += 1

    def loss(self, step: Step) -> Tensor:
        """The pictures' loss, and what the method adds."""
        self.learner.before_step(step.chosen)
        noised = self._noised(step.chosen, step.bare, step.noise, step.level_B, self.progress.step)
        loss = self.goal.errors(noised).mean()
        if self.regularization is not None:
            loss = loss + self.config.regularize * self.regularization.loss(self.objective, self.progress.step)
        extra = self.learner.extra_loss()
        return loss if extra is None else loss + extra

    def encode_captions(self, step: Step) -> None:
        """Encodes what a step reads where prompts are remembered, so that its time is that of all further ones."""
        if not self.objective.remembers:
            return
        with torch.no_grad():
            for words in (self.learner.captions(step.chosen), [""] * len(step.chosen)):
                self.goal.condition(words, step.chosen)

    def _preserve(self, step: Step) -> float:
        """Adds the gradient of the distance to the base on unrelated prompts."""
        clean = self.batches.latents[torch.tensor(step.preserved_from)]
        clean, noise, level_B = self._moved(clean, step.preserved_noise, step.preserved_level_B)
        noisy = self.objective.noised(clean, noise, level_B)
        every = [*self.prompts, *self.guarded]
        weight_of = [1.0] * len(self.prompts) + [self.config.guard_weight] * len(self.guarded)
        if self.strangers is not None:
            every += self.strangers.prompts
            weight_of += [1.0] * len(self.strangers.prompts)
            self.strangers.draw(self.progress.step, len(step.preserved))
        words, beside = [every[i] for i in step.preserved], step.preserved_from
        weights = torch.tensor([weight_of[i] for i in step.preserved])
        with torch.no_grad(), self.learner.off():
            wanted = self.objective.predict(noisy, level_B, self.goal.condition(words, beside))
        with self.goal.acting(self.progress.step):
            given = self.objective.predict(noisy, level_B, self.goal.condition(words, beside))
            loss = (weights.to(given.device) * weighted_mse(given, wanted, None)).mean()
            if loss.requires_grad:
                (self.config.preserve * self.config.preserve_every * loss).backward()
        return float(loss.detach())

    def _noised(
        self, chosen: Sequence[int], bare: Sequence[bool], noise: Tensor, level_B: Tensor, number: int | None
    ) -> Noised:  # fmt: skip
        index = torch.tensor(list(chosen))
        clean, noise, level_B = self._moved(self.batches.latents[index], noise, level_B)
        mask = None if self.batches.masks is None else self.batches.masks[index].to(clean.device)
        return Noised(chosen=chosen, bare=bare, clean=clean, noise=noise, level_B=level_B, mask=mask, number=number)

    def _factor(self) -> float:
        step, config = self.progress.step, self.config
        warm = min(1.0, (step + 1) / (config.warmup + 1))
        late = max(0.0, 2 * step / config.steps - 1)
        return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * late)))

    def _moved(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.objective.device) for tensor in tensors)

    # ---- previews ---------------------------------------------------------------------------------------------------

    def _preview(self, on_preview: Callable[[Progress], None]) -> None:
        self.learner.settle()
        error, drift = self.score()
        score = 1 - error - drift
        progress = self.progress
        progress.scores.append((progress.step, score, error, drift))
        if progress.best < 0 or score > progress.scores[progress.best][1]:
            progress.best = len(progress.scores) - 1
            self.best = self._copy()
        progress.stopped = len(progress.scores) - 1 - progress.best >= self.config.patience
        on_preview(progress)

    @torch.no_grad()
    def score(self) -> tuple[float, float]:
        """Error on the pictures as a share of the base's, and drift on unrelated prompts as a share of their size."""
        if self._base_scores is None:
            with self.learner.off():
                self._base_scores = self._held()
        base_error, base_out = self._base_scores
        error, out = self._held()
        if not len(base_out):
            return float(error / base_error), 0.0
        # With one noise for all prompts, what differs between them is what the prompts say.
        apart = base_out.var(0, unbiased=False).mean() if len(base_out) > 1 else base_out.square().mean()
        return float(error / base_error), float((out - base_out).square().mean() / apart.clamp_min(1e-12))

    @torch.no_grad()
    def guard_drift(self) -> float:
        """How far the guarded prompts have moved from the base, as a share of how far they are from each other."""
        noise = torch.randn(1, *self.batches.latents.shape[1:], generator=torch.Generator().manual_seed(29))
        same = noise.to(self.objective.device).expand(len(self.guarded), *noise.shape[1:])
        beside = [i % len(self.batches.latents) for i in range(len(self.guarded))]

        def predicted() -> Tensor:
            condition = self.goal.condition(self.guarded, beside)
            return self.objective.predict(same, self._loud(len(self.guarded)), condition)

        with self.learner.off():
            base = predicted()
        apart = base.var(0, unbiased=False).mean().clamp_min(1e-12)
        return float((predicted() - base).square().mean() / apart)

    def _held(self) -> tuple[Tensor, Tensor]:
        """Error on the pictures, and predictions for unrelated prompts, both at held noise."""
        examples = range(self.batches.own)
        generator = torch.Generator().manual_seed(self.config.seed + 17)
        chosen = [examples[i % len(examples)] for i in range(max(_SCORED, len(examples)))]
        noise = torch.randn(len(chosen), *self.batches.latents.shape[1:], generator=generator)
        self.learner.before_step(chosen)
        noised = self._noised(chosen, [False] * len(chosen), noise, self.objective.fixed_levels(len(chosen)), None)
        error = self.goal.errors(noised).mean()
        words = self.prompts[:_SCORED_PROMPTS]
        if not words:
            return error, noised.clean[:0]
        condition = self.goal.condition(words, [examples[i % len(examples)] for i in range(len(words))])
        same = noised.noise[:1].expand(len(words), *noise.shape[1:])
        return error, self.objective.predict(same, self._loud(len(words)), condition)

    def _loud(self, count: int) -> Tensor:
        """The highest of the held levels, where the prompt alone decides."""
        return self.objective.fixed_levels(_SCORED)[-1:].expand(count).to(self.objective.device)

    # ---- the state --------------------------------------------------------------------------------------------------

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def _kept(self) -> Kept:
        return Kept(parameters=self.parameters, best=self.best, optimizer=self.optimizer, learner=self.learner)

    def save(self) -> None:
        """Writes the state, whole or not at all. One that is there is replaced."""
        if self.state_file is not None:
            self._kept().write(self.state_file, self.progress, self.identity)
