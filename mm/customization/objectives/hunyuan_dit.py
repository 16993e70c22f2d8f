"""HunyuanDiT: a transformer under discrete diffusion, whose prompts two text encoders read.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor

from mm.customization.objectives.unets import StableDiffusion

_TOKENS = (77, 256)  # that the call gives to each text encoder
_ORIGINAL = (1024, 1024)  # the size that the call gives by default to the sources of pictures
_BASE = 64  # latents a side that positions are scaled to


class HunyuanDiT(StableDiffusion):
    """HunyuanDiT 1.0 and 1.1, which read the picture's size, and 1.2, which does not."""

    parts = ("transformer",)
    pipelines = ("HunyuanDiTPipeline", "HunyuanDiTPAGPipeline")

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        made: dict[str, Tensor] = {}
        for index, (tokens, end) in enumerate(zip(_TOKENS, ("", "_t5"), strict=True)):
            text, _, mask, _ = self.pipe.encode_prompt(
                list(prompts), device=self.device, dtype=self.dtype, do_classifier_free_guidance=False,
                max_sequence_length=tokens, text_encoder_index=index,
            )  # fmt: skip
            made |= {f"encoder_hidden_states{end}": text, f"text_embedding_mask{end}": mask}
        return made

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        batch, channels, height, width = noisy_BCHW.shape
        device, scale = noisy_BCHW.device, self.pipe.vae_scale_factor
        sizes = torch.tensor([*_ORIGINAL, height * scale, width * scale, 0, 0], device=device, dtype=self.dtype)
        given = {key: text.to(self.dtype) if "hidden" in key else text for key, text in condition.items()}
        out: Tensor = self.pipe.transformer(
            noisy_BCHW.to(self.dtype), level_B.to(self.dtype), **given, image_meta_size=sizes.repeat(batch, 1),
            style=torch.zeros(batch, dtype=torch.long, device=device),
            image_rotary_emb=self._positions(height, width, device), return_dict=False,
        )[0]  # fmt: skip
        return out[:, :channels].float()  # the rest is a variance, which sampling leaves out

    def _positions(self, height: int, width: int, device: torch.device) -> Any:
        """Of patches, scaled to the area of pictures of 512 x 512 pixels."""
        transformer = self.pipe.transformer
        patch = transformer.config.patch_size
        grid = (height // patch, width // patch)
        return get_2d_rotary_pos_embed(
            transformer.inner_dim // transformer.num_heads, get_resize_crop_region_for_grid(grid, _BASE // patch), grid,
            device=device, output_type="pt",
        )  # fmt: skip
