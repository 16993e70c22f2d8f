"""SANA-Sprint, a consistency model under TrigFlow.

TrigFlow mixes x_t = cos(t) clean + sin(t) noise, t from 0 to pi / 2, and predicts v = cos(t) noise - sin(t) clean. The
network itself is one of flow matching: it reads x_t / (cos(t) + sin(t)) = (1 - s) clean + s noise at
s = sin(t) / (cos(t) + sin(t)), and v is linear in those and its output. So it is trained here as flow matching at s.
Sources: Chen et al. 2025, SANA-Sprint, arXiv 2503.09641; Lu & Song 2024, TrigFlow, arXiv 2410.11081.

Design choices
- What the base draws in two steps stays sharp because unrelated prompts are held to it; its own losses (consistency,
  adversarial) are not computed.
- Levels are those of its consistency training, log(tan(t)) from a normal distribution: higher ones than of SANA, since
  its two steps are at s = 1 and 0.78.
- Guidance is an input of the network, which was distilled around the family's usual scale. It is trained at that.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mm.customization.objectives.transformers import Sana
from mm.families import family_named

_MEAN = 0.2  # of log(sigma), where tan(t) = sigma / sigma_data


class SanaSprint(Sana):
    """SANA-Sprint; levels are s."""

    spread = 1.6

    def encode_prompts(self, prompts: Any) -> Any:
        text, mask = self.pipe.encode_prompt(
            list(prompts), device=self.device, complex_human_instruction=self._usual_instruction()
        )
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        transformer = self.pipe.transformer
        guidance = family_named("sana-sprint").guidance or 1.0
        scale = torch.full_like(level_B, guidance * transformer.config.guidance_embeds_scale, dtype=torch.float32)
        out = transformer(
            noisy_BCHW.to(self.dtype), timestep=level_B, guidance=scale.to(self.dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_attention_mask=condition["encoder_attention_mask"], return_dict=False,
        )[0]  # fmt: skip
        return out.float()

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        mean = _MEAN - math.log(self._deviation)
        return torch.sigmoid(mean + self.spread * torch.randn(count, generator=generator))

    def level_of(self, timestep: float) -> Tensor:
        sine, cosine = math.sin(timestep), math.cos(timestep)
        return torch.tensor([sine / (sine + cosine)])

    @property
    def _deviation(self) -> float:
        """Of clean latents in the pipeline's call."""
        return float(self.pipe.scheduler.config.sigma_data)

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW * self._deviation

    def noised_in_call(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        level = level_B.view(-1, 1, 1, 1)
        length = (level.square() + (1 - level).square()).sqrt()  # 1 / (cos(t) + sin(t))
        return self.packed(self.noised(clean, noise, level_B) / length)
