"""FLUX.2 and FLUX.2-klein: latents are 2 x 2 patches, normalized by the autoencoder's running moments.

Conventions of the call (timestep's unit, coordinates of tokens) are those of diffusers' pipelines.

Legend: B pictures, C channels, H x W latents, S side of the pictures, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.customization.objectives.processes import FlowObjective
from mm.customization.objectives.protocol import Edits


class Flux2(FlowObjective):
    """Draws from text, and changes a source picture whose tokens lie behind the noisy ones.

    Where the model reads a guidance scale, it is trained at 1, so that the adapter holds at any.
    """

    edits: Edits = "also"

    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(pictures_B3SS.to(vae.device, vae.dtype)).latent_dist.mode().float()
        mean, deviation = self._moments(latents.device)
        return (self.pipe._patchify_latents(latents) - mean) / deviation

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean, deviation = self._moments(latents_BCHW.device)
        latents = self.pipe._unpatchify_latents(latents_BCHW * deviation + mean)
        return vae.decode(latents.to(vae.device, vae.dtype)).sample

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation (1, C, 1, 1) of the patches."""
        vae = self.pipe.vae
        mean = vae.bn.running_mean.view(1, -1, 1, 1).float()
        variance = vae.bn.running_var.view(1, -1, 1, 1).float()
        return mean.to(device), (variance + vae.config.batch_norm_eps).sqrt().to(device)

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, ids = self.pipe.encode_prompt(list(prompts), device=self.device)
        return {"encoder_hidden_states": text, "txt_ids": ids}

    def encode_edits(self, instructions: Sequence[str], pictures_B3SS: Tensor, latents_BCHW: Tensor) -> Any:
        return self.encode_prompts(instructions) | {"source": latents_BCHW}

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        packed: Tensor = self.pipe._pack_latents(latents_BCHW)
        return packed

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        batch, _, height, width = noisy_BCHW.shape
        pipe, dtype, device = self.pipe, self.dtype, noisy_BCHW.device
        packed, ids = self.packed(noisy_BCHW.to(dtype)), pipe._prepare_latent_ids(noisy_BCHW)
        length = packed.shape[1]
        if "source" in condition:
            source = condition["source"].to(dtype)
            packed = torch.cat([packed, self.packed(source)], 1)
            behind = pipe._prepare_image_ids([source[:1]]).expand(batch, -1, -1)
            ids = torch.cat([ids.to(device), behind.to(device)], 1)
        guided = pipe.transformer.config.guidance_embeds
        out_BLC = pipe.transformer(
            hidden_states=packed, timestep=level_B.to(dtype), img_ids=ids.to(device), txt_ids=condition["txt_ids"],
            guidance=torch.ones(batch, device=device) if guided else None,
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype), return_dict=False,
        )[0][:, :length]  # fmt: skip
        return out_BLC.float().transpose(1, 2).reshape(batch, -1, height, width)
