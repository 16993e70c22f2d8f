"""The stem stage: latents learn to be seen by the understanding encoder as the pictures they stand for.

Design choices
- Distillation: the frozen encoder's tokens of a rendered picture are the target for its tokens of the same picture's
  latents. It needs no labels and tells every token what it should have been.
- A little noise on the latents, as joint training has: drawn latents are not quite those of an encoded picture.
- The error is a share of the targets' variance, so that it reads as "how much of what the encoder sees is lost".

This module does not know the loop, files or the trunk.
Legend: B pictures, C latent channels, L = 64 tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm.models.understanding import LatentStem, UnderstandingEncoder
from mm.world.render import render
from mm.world.scene import Scene


@dataclass(frozen=True, kw_only=True)
class StemConfig:
    """What the stem stage learns; `noise` is the deviation of what is added to unit latents."""

    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise {self.noise} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class StemBatch:
    """Pictures in [-1, 1] and their latents, noisy already."""

    pictures_BCHW: torch.Tensor
    latents_BCHW: torch.Tensor


def make_batch(
    scenes: Sequence[Scene], latents: torch.Tensor, generator: torch.Generator, config: StemConfig
) -> StemBatch:
    """Freshly rendered pictures beside the cached latents of the same scenes."""
    noise = config.noise * torch.randn(latents.shape, generator=generator)
    return StemBatch(pictures_BCHW=render(scenes).float() / 127.5 - 1, latents_BCHW=latents + noise)


class Stem(nn.Module):
    """The stem with its loss."""

    def __init__(self, stem: LatentStem, encoder: UnderstandingEncoder) -> None:
        super().__init__()
        self.stem = stem
        # In a list, so that it is no part of this module: neither trained nor averaged nor saved with the state.
        self._encoder = [encoder.requires_grad_(False).eval()]

    def forward(self, batch: StemBatch) -> dict[str, torch.Tensor]:
        """The share of the tokens' variance that is lost."""
        encoder: Any = self._encoder[0]
        encoder = encoder.to(batch.pictures_BCHW.device)
        with torch.no_grad():
            wanted = encoder(batch.pictures_BCHW)[1].float()
        seen = encoder.encode_patches(self.stem(batch.latents_BCHW))[1].float()
        return {"lost": (seen - wanted).square().mean() / wanted.var()}
