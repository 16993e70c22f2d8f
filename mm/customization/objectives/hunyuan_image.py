"""HunyuanImage 2.1: one text encoder reads the prompt, and another what is to be written, between quotation marks.

Design choices
- Prompts are padded to 1000 tokens, which the transformer masks: they are kept without the padding that all have.
- Guidance is that of the pipeline's guider, outside of the transformer, so that the plain prediction is trained.
- The distilled model reads a guidance scale, and the noise level to which a step goes. It is trained at a scale of 1,
  and at steps of no length, whose mean velocity is the velocity itself (MeanFlow, Geng et al. 2025, arXiv 2505.13447).

Legend: B pictures, C channels, H x W latents, S side of the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.customization.objectives.processes import FlowObjective
from mm.customization.objectives.remembered import padded, stacked
from mm.customization.objectives.scaled import ScaledLatents


class HunyuanImage(ScaledLatents, FlowObjective):
    """HunyuanImage 2.1, without its refiner."""

    pipelines = ("HunyuanImagePipeline",)

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, mask, written, written_mask = self.pipe.encode_prompt(
            list(prompts), device=self.device, batch_size=len(prompts)
        )
        longest = int(mask.sum(1).max())
        return {
            "encoder_hidden_states": text[:, :longest], "encoder_attention_mask": mask[:, :longest],
            "encoder_hidden_states_2": written, "encoder_attention_mask_2": written_mask,
        }  # fmt: skip

    def joined(self, conditions: Sequence[Any]) -> Any:
        text, mask = padded(
            [c["encoder_hidden_states"] for c in conditions], [c["encoder_attention_mask"] for c in conditions]
        )
        written = [{key: value for key, value in c.items() if key.endswith("_2")} for c in conditions]
        return stacked(written) | {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        transformer = self.pipe.transformer
        timestep = (level_B * self.pipe.scheduler.config.num_train_timesteps).to(self.dtype)
        guided, meanflow = transformer.config.guidance_embeds, transformer.config.use_meanflow
        out: Tensor = transformer(
            noisy_BCHW.to(self.dtype), timestep=timestep, timestep_r=timestep if meanflow else None,
            guidance=torch.full_like(timestep, 1000.0) if guided else None,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_attention_mask=condition["encoder_attention_mask"],
            encoder_hidden_states_2=condition["encoder_hidden_states_2"].to(self.dtype),
            encoder_attention_mask_2=condition["encoder_attention_mask_2"], return_dict=False,
        )[0]  # fmt: skip
        return out.float()
