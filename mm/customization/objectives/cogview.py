"""CogView4: the timestep that the transformer reads is shifted by the picture's size to give the noise level.

Design choices
- Prompts are read alone, each at its own length, as the call reads one prompt: neither the text encoder nor the
  transformer masks padding. (The transformer's `attention_mask` adds 1 where it should hide nothing, and 0 elsewhere.)
- Timesteps are drawn, and noise levels are theirs, as in diffusers' script that trains CogView4.

Legend: B pictures, C channels, H x W latents, S side of the pictures, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.customization.objectives.processes import FlowObjective
from mm.customization.objectives.scaled import ScaledLatents


class CogView4(ScaledLatents, FlowObjective):
    """CogView4."""

    pipelines = ("CogView4Pipeline",)

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        given = {"do_classifier_free_guidance": False, "device": self.device}
        return {"texts": [self.pipe.encode_prompt([prompt], **given)[0][0] for prompt in prompts]}

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([text.float().mean(0) for text in self.conditions(prompts)["texts"]])

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        latents = self.side // self.pipe.vae_scale_factor
        drawn, shift = super().levels(count, generator), self._shift(latents, latents)
        return shift * drawn / (1 + (shift - 1) * drawn)

    def level_of(self, timestep: float) -> Tensor:
        return torch.tensor([timestep])  # this pipeline gives its step callback the noise level

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        texts: list[Tensor] = condition["texts"]
        rows: dict[int, list[int]] = {}
        for row, text in enumerate(texts):
            rows.setdefault(len(text), []).append(row)
        made = [
            self._predicted(noisy_BCHW[group], level_B[group], torch.stack([texts[row] for row in group]))
            for group in rows.values()
        ]
        order = torch.tensor([row for group in rows.values() for row in group])
        return torch.cat(made)[order.argsort().to(noisy_BCHW.device)]

    def _predicted(self, noisy_BCHW: Tensor, level_B: Tensor, text_BTD: Tensor) -> Tensor:
        """The prediction for texts of one length."""
        batch, _, height, width = noisy_BCHW.shape
        size = torch.tensor([[height, width]], device=noisy_BCHW.device, dtype=self.dtype).repeat(batch, 1)
        size = size * self.pipe.vae_scale_factor
        shift = self._shift(height, width)
        timestep = self.pipe.scheduler.config.num_train_timesteps * level_B / (shift - (shift - 1) * level_B)
        out: Tensor = self.pipe.transformer(
            hidden_states=noisy_BCHW.to(self.dtype), encoder_hidden_states=text_BTD.to(self.dtype), timestep=timestep,
            original_size=size, target_size=size, crop_coords=torch.zeros_like(size), return_dict=False,
        )[0]  # fmt: skip
        return out.float()

    def _shift(self, height: int, width: int) -> float:
        """The factor s by which a timestep t, from 0 to 1, gives the noise level s t / (1 + (s - 1) t)."""
        scheduler = self.pipe.scheduler
        config = scheduler.config
        if not config.use_dynamic_shifting:
            return float(scheduler.shift)
        tokens = height * width / self.pipe.transformer.config.patch_size**2
        mu: float = (tokens / config.base_image_seq_len) ** 0.5 * config.max_shift + config.base_shift
        return mu if config.time_shift_type == "linear" else math.exp(mu)
