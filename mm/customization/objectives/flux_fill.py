"""FLUX.1 Fill: beside the noisy latents it reads those of a picture without what its mask hides, and the mask.

Design choices
- Everything is hidden while a subject or a style is learned, so that it is drawn under a mask of any shape, and no part
  of a training picture is given away.

Legend: B pictures, C channels, H x W latents, L patches of 2 x 2 latents, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm.customization.objectives.transformers import Flux


class FluxFill(Flux):
    """FLUX.1 Fill."""

    pipelines = ("FluxFillPipeline",)

    def __init__(self, pipe: Any, side: int) -> None:
        super().__init__(pipe, side)
        self._hidden: dict[tuple[int, int], Tensor] = {}

    def read(self, noisy_BCHW: Tensor) -> Tensor:
        batch, _, height, width = noisy_BCHW.shape
        if (height, width) not in self._hidden:
            self._hidden[height, width] = self._all_hidden(height, width)
        hidden_1LD = self._hidden[height, width].to(noisy_BCHW)
        return torch.cat([super().read(noisy_BCHW), hidden_1LD.expand(batch, -1, -1)], 2)

    @torch.no_grad()
    def _all_hidden(self, height: int, width: int) -> Tensor:
        """An empty picture's latents and a mask of ones, as the call packs them, a channel for each pixel."""
        scale = self.pipe.vae_scale_factor
        empty = self.packed(self.encode_pictures(torch.zeros(1, 3, height * scale, width * scale)))
        return torch.cat([empty, torch.ones(*empty.shape[:2], 4 * scale**2, device=empty.device)], 2)
