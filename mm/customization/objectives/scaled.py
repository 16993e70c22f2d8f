"""Autoencoders whose latents the denoiser reads scaled by one factor.

Legend: B pictures, C channels, H x W latents, S side of the pictures.
"""

from __future__ import annotations

from torch import Tensor

from mm.customization.objectives.protocol import Objective


class ScaledLatents(Objective):
    """Encodes and decodes with `scaling_factor` of the autoencoder's config."""

    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(pictures_B3SS.to(vae.device, vae.dtype)).latent_dist.mode()
        return latents.float() * vae.config.scaling_factor

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.decode((latents_BCHW / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample
