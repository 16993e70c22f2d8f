"""Finite-scalar and vector quantized tokenizers, trained end to end: the comparison for TokenBridge's bridge.

Design choices
- The same encoder and decoder as `Autoencoder`; only what lies between them differs, so that a table compares
  quantizers.
- By default both spend the bridge's bits: 64 cells x 96 bits. FSQ (arXiv 2309.15505) rounds each of 16 channels to 64
  levels; VQ splits the 16 channels into 8 pairs, each with a codebook of 4096 entries of its own.
- Quantizers come from vector-quantize-pytorch, imported on first construction (it costs seconds).
- `encode` returns the values that the codes stand for, normalized by the config's mean and deviation like the
  autoencoder's.

Legend: B batch, C channels, G codes per cell, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from mm.layers.entry_points import ForwardMixin, entry_point
from mm.tokenizers.autoencoder import decoder_layers, encoder_layers, normalize

KINDS = ("fsq", "vq")


def _quantizer(kind: str, channels: int, groups: int, levels: int) -> nn.Module:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; give one of {', '.join(KINDS)}")
    if channels % groups:
        raise ValueError(f"{channels} channels do not split into {groups} groups")
    from vector_quantize_pytorch import FSQ, VectorQuantize

    if kind == "fsq":
        if groups != channels:
            raise ValueError(f"FSQ rounds every channel: groups is {groups}; give {channels}")
        return FSQ(levels=[levels], num_codebooks=groups, dim=channels)
    return VectorQuantize(
        dim=channels,
        codebook_dim=channels // groups,
        codebook_size=levels,
        heads=groups,
        separate_codebook_per_head=True,
        accept_image_fmap=True,
        decay=0.95,
        kmeans_init=False,
        # A batch holds fewer vectors than a codebook entries: at the usual 1 every code would be dead, always.
        threshold_ema_dead_code=0.05,  # pyright: ignore[reportArgumentType]
        rotation_trick=True,
    )


class QuantizedTokenizer(ForwardMixin, ModelMixin, ConfigMixin):
    """Pictures in [-1, 1] to codes (B, G, H / 16, W / 16), and back."""

    @register_to_config
    def __init__(
        self,
        kind: str = "fsq",
        latent_channels: int = 16,
        groups: int | None = None,
        levels: int | None = None,
        encoder_widths: Sequence[int] = (48, 96, 160),
        encoder_depths: Sequence[int] = (1, 1, 1),
        decoder_widths: Sequence[int] = (160, 96, 64),
        decoder_depths: Sequence[int] = (2, 2, 1),
        refine_width: int = 32,
        sample_size: int = 128,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups or (latent_channels if kind == "fsq" else latent_channels // 2)
        self.levels = levels or (64 if kind == "fsq" else 4096)
        self.encoder = encoder_layers(latent_channels, encoder_widths, encoder_depths)
        self.quantizer = _quantizer(kind, latent_channels, self.groups, self.levels)
        self.decoder = decoder_layers(latent_channels, decoder_widths, decoder_depths, refine_width)

    @entry_point
    def quantize(self, features_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder features to the codes' values (B, C, H, W), codes (B, G, H, W) and the commitment loss."""
        # distances and rounding in fp32: half precision would move values between neighbouring codes
        with torch.autocast(features_BCHW.device.type, enabled=False):
            result = self.quantizer(features_BCHW.float())
        values_BCHW, codes_BHWG = result[0], result[1]
        commitment = result[2].sum() if len(result) > 2 else values_BCHW.new_zeros(())
        codes_BGHW = codes_BHWG.long().permute(0, 3, 1, 2).contiguous()
        return values_BCHW.to(features_BCHW.dtype), codes_BGHW, commitment

    def training_latents(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder reads while training, and the auxiliary loss."""
        values_BCHW, _, commitment = self.quantize(self.encoder(images_BCHW))
        return values_BCHW, commitment

    @entry_point
    def codes(self, images_BCHW: Tensor) -> Tensor:
        """Codes of pictures, int64 (B, G, H / 16, W / 16)."""
        return self.quantize(self.encoder(images_BCHW.to(self.dtype)))[1]

    @entry_point
    def dequantize(self, codes_BGHW: Tensor) -> Tensor:
        """Latents with unit deviation that codes stand for, ready for `decode`."""
        if codes_BGHW.ndim != 4 or codes_BGHW.shape[1] != self.groups:
            raise ValueError(f"codes of shape {tuple(codes_BGHW.shape)}; give (B, {self.groups}, H, W)")
        codes_BHWG = codes_BGHW.permute(0, 2, 3, 1)
        quantizer: Any = self.quantizer
        read = quantizer.indices_to_codes if self.config.kind == "fsq" else quantizer.get_output_from_indices
        raw_BCHW = read(codes_BHWG)
        return normalize(raw_BCHW, self.config.latents_mean, self.config.latents_std)

    def raw_latents(self, images_BCHW: Tensor) -> Tensor:
        """Values of the codes on the decoder's own scale."""
        return self.quantize(self.encoder(images_BCHW.to(self.dtype)))[0]

    @entry_point
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Values of the codes, with unit deviation per channel."""
        return normalize(self.raw_latents(images_BCHW), self.config.latents_mean, self.config.latents_std)

    @entry_point
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, 16 H, 16 W) of latents with unit deviation."""
        mean, std = self.config.latents_mean, self.config.latents_std
        raw_BCHW = normalize(latents_BCHW, mean, std, reverse=True)
        return self.decoder(raw_BCHW.to(self.dtype)).clamp(-1, 1)

    def bits_per_picture(self) -> float:
        cells = (self.config.sample_size // 16) ** 2
        return cells * self.groups * math.log2(self.levels)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.decode(self.encode(images_BCHW))
