"""PixArt-alpha and PixArt-Sigma: a transformer under discrete diffusion.

Legend: B pictures, C channels, H x W latents, S side of the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.customization.objectives.unets import StableDiffusion


class PixArt(StableDiffusion):
    """PixArt-alpha, which may read the picture's size, and PixArt-Sigma, which does not."""

    parts = ("transformer",)

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, mask, *_ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=self.device)
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        transformer, channels = self.pipe.transformer, noisy_BCHW.shape[1]
        out = transformer(
            noisy_BCHW.to(self.dtype), timestep=level_B, added_cond_kwargs=self._size(noisy_BCHW),
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_attention_mask=condition["encoder_attention_mask"], return_dict=False,
        )[0]  # fmt: skip
        return out[:, :channels].float()  # the rest is a variance, which sampling leaves out

    def _size(self, noisy_BCHW: Tensor) -> dict[str, Any]:
        if not self.pipe.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        sides = torch.full((len(noisy_BCHW), 2), float(self.side), device=noisy_BCHW.device, dtype=self.dtype)
        return {"resolution": sides, "aspect_ratio": sides[:, :1] / sides[:, 1:]}
