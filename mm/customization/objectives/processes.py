"""How noise is added, and what is predicted of it: flow matching, and discrete diffusion.

Legend: B pictures.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.core.nouns import with_article
from mm.customization.objectives.protocol import Objective


class FlowObjective(Objective):
    """Flow matching: x_s = (1 - s) clean + s noise, and the velocity noise - clean is predicted.

    Levels are logit-normal (Esser et al. 2024, arXiv 2403.03206).
    """

    mean, spread = 0.0, 1.0

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(self.mean + self.spread * torch.randn(count, generator=generator))

    def fixed_levels(self, count: int) -> Tensor:
        return (torch.arange(count) + 0.5) / count

    def strength(self, level_B: Tensor) -> Tensor:
        return level_B

    def louder(self, level_B: Tensor) -> Tensor:
        return 0.5 + level_B / 2

    def level_of(self, timestep: float) -> Tensor:
        return torch.tensor([timestep / self.pipe.scheduler.config.num_train_timesteps])

    def noised(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        level = level_B.view(-1, *[1] * (clean.ndim - 1))
        return (1 - level) * clean + level * noise

    def target(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        return noise - clean


class DiffusionObjective(Objective):
    """Discrete diffusion: epsilon, v or the clean picture is predicted, as the scheduler's config says."""

    parts = ("unet",)

    def _signal_B(self, level_B: Tensor) -> Tensor:
        return self._alphas[level_B.long().cpu()].float().to(level_B.device)

    @property
    def _alphas(self) -> Tensor:
        alphas = getattr(self.pipe.scheduler, "alphas_cumprod", None)
        if alphas is None:
            kind = type(self.pipe.scheduler).__name__
            raise UserError(
                f"{with_article(kind)} has no noise levels to train at; give the pipeline a DDIM or Euler scheduler"
            )
        return cast(Tensor, alphas)

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self._alphas), (count,), generator=generator)

    def fixed_levels(self, count: int) -> Tensor:
        return ((torch.arange(count) + 0.5) / count * len(self._alphas)).long()

    def strength(self, level_B: Tensor) -> Tensor:
        return level_B.float() / len(self._alphas)

    def louder(self, level_B: Tensor) -> Tensor:
        return (len(self._alphas) + level_B) // 2

    def level_of(self, timestep: float) -> Tensor:
        return torch.tensor([float(timestep)])

    def noised_in_call(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        noisy = super().noised_in_call(clean, noise, level_B)
        if getattr(self.pipe.scheduler, "init_noise_sigma", 1) == 1:
            return noisy
        signal = self._signal_B(level_B).view(-1, 1, 1, 1)
        return noisy / signal.sqrt()  # Euler and others keep clean + sigma x noise, whose signal stays at 1

    def noised(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        signal = self._signal_B(level_B).view(-1, 1, 1, 1)
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        kind = self.pipe.scheduler.config.get("prediction_type", "epsilon")
        signal = self._signal_B(level_B).view(-1, 1, 1, 1)
        if kind == "v_prediction":
            return signal.sqrt() * noise - (1 - signal).sqrt() * clean
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return clean
        raise UserError(f"the scheduler predicts {kind!r}; epsilon, v_prediction and sample can be trained")
