"""AuraFlow: time runs from 0, the picture, to 1, noise, as the noise level does.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mm.customization.objectives.transformers import StableDiffusion3


class AuraFlow(StableDiffusion3):
    """AuraFlow, whose prompts are zero where they are padded."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, *_ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=self.device)
        return {"encoder_hidden_states": text}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        out: Tensor = self.pipe.transformer(
            noisy_BCHW.to(self.dtype), timestep=level_B.to(self.dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype), return_dict=False,
        )[0]  # fmt: skip
        return out.float()
