"""Chroma: FLUX.1 without a pooled prompt, whose transformer masks the padding of T5.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mm.customization.objectives.transformers import Flux, unpacked


class Chroma(Flux):
    """Chroma."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, ids, mask, *_ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": text, "txt_ids": ids, "mask": mask}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        batch, _, height, width = noisy_BCHW.shape
        pipe, dtype = self.pipe, self.dtype
        packed = self.packed(noisy_BCHW.to(dtype))
        mask = pipe._prepare_attention_mask(
            batch_size=batch, sequence_length=packed.shape[1], dtype=dtype, attention_mask=condition["mask"]
        )
        out = pipe.transformer(
            hidden_states=packed, timestep=level_B.to(dtype), txt_ids=condition["txt_ids"],
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy_BCHW.device, dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype), attention_mask=mask,
            return_dict=False,
        )[0]  # fmt: skip
        return unpacked(out.float(), height, width)
