"""Stable Diffusion 1.x and 2.x, and XL: a UNet under discrete diffusion.

Legend: B pictures, C channels, H x W latents, S side of the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.customization.objectives.processes import DiffusionObjective
from mm.customization.objectives.scaled import ScaledLatents


class StableDiffusion(ScaledLatents, DiffusionObjective):
    """Stable Diffusion 1.x and 2.x."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, _ = self.pipe.encode_prompt(list(prompts), self.device, 1, False)
        return {"encoder_hidden_states": text}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        given = {key: value.to(self.dtype) for key, value in condition.items()}
        return self.pipe.unet(noisy_BCHW.to(self.dtype), level_B, **given).sample.float()


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, and the picture's size among the conditions."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": text, "text_embeds": pooled}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        size = torch.tensor([self.side, self.side, 0, 0, self.side, self.side], device=noisy_BCHW.device)
        added = {
            "text_embeds": condition["text_embeds"].to(self.dtype),
            "time_ids": size.expand(len(noisy_BCHW), -1).to(self.dtype),
        }
        text = condition["encoder_hidden_states"].to(self.dtype)
        out = self.pipe.unet(
            noisy_BCHW.to(self.dtype), level_B, encoder_hidden_states=text, added_cond_kwargs=added
        )  # fmt: skip
        return out.sample.float()
