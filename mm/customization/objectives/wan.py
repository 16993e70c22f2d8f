"""Wan 2.1 and 2.2: a picture is a video of one frame.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.objectives.remembered import stacked
from mm.customization.objectives.transformers import QwenImage

_TOKENS = 512  # of a prompt: the call's default; that of `encode_prompt` is another


class Wan(QwenImage):
    """Wan with one transformer, whose autoencoder is one of videos as Qwen-Image's is."""

    pipelines = ("WanPipeline",)

    def __init__(self, pipe: Any, side: int) -> None:
        super().__init__(pipe, side)
        if pipe.transformer is None or pipe.transformer_2 is not None:
            raise UserError(
                "Wan 2.2 with a transformer for high noise and one for low noise cannot be customized yet; Wan 2.1 and "
                "Wan 2.2 with one transformer (TI2V-5B) can"
            )

    @property
    def dtype(self) -> torch.dtype:
        """That of most parameters: a few, the first among them, stay in float32."""
        kind: torch.dtype = self.pipe.transformer.dtype
        return kind

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, max_sequence_length=_TOKENS
        )
        return {"encoder_hidden_states": text}

    def joined(self, conditions: Sequence[Any]) -> Any:
        return stacked(conditions)  # all of the same length

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW[:, :, None]

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        _, _, height, width = noisy_BCHW.shape
        timestep = level_B * self.pipe.scheduler.config.num_train_timesteps
        if self.pipe.config.expand_timesteps:  # TI2V-5B reads one for each token
            _, tall, wide = self.pipe.transformer.config.patch_size
            timestep = timestep[:, None].expand(-1, (height // tall) * (width // wide))
        out: Tensor = self.pipe.transformer(
            hidden_states=self.packed(noisy_BCHW.to(self.dtype)), timestep=timestep,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype), return_dict=False,
        )[0]  # fmt: skip
        return out[:, :, 0].float()
