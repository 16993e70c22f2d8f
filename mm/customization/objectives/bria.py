"""Bria 3.2: FLUX's packed latents, with prompts that are zero where they are padded, and no pooled text.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.customization.objectives.transformers import StableDiffusion3, unpacked


class Bria(StableDiffusion3):
    """Bria 3.2."""

    pipelines = ("BriaPipeline",)

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, _, _ = self.pipe.encode_prompt(list(prompts), device=self.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text}

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        packed: Tensor = self.pipe._pack_latents(latents_BCHW, *latents_BCHW.shape)
        return packed

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        _, _, height, width = noisy_BCHW.shape
        pipe, device, text = self.pipe, noisy_BCHW.device, condition["encoder_hidden_states"]
        out: Tensor = pipe.transformer(
            hidden_states=self.packed(noisy_BCHW.to(self.dtype)), encoder_hidden_states=text.to(self.dtype),
            timestep=level_B * pipe.scheduler.config.num_train_timesteps,
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=pipe._prepare_latent_image_ids(1, height // 2, width // 2, device, self.dtype), return_dict=False,
        )[0]  # fmt: skip
        return unpacked(out.float(), height, width)
