"""Lumina-Image 2.0: time runs from noise to picture, and the output is the negative velocity.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mm.customization.objectives.transformers import StableDiffusion3


class Lumina2(StableDiffusion3):
    """Lumina-Image 2.0. Prompts get the instruction that the pipeline's call puts in front of them."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, mask, *_ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=self.device)
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        out = self.pipe.transformer(
            hidden_states=noisy_BCHW.to(self.dtype), timestep=(1 - level_B).to(self.dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_attention_mask=condition["encoder_attention_mask"], return_dict=False,
        )[0]  # fmt: skip
        return -out.float()
