"""The crisp stage's discriminator, which distinguishes renders from decoded pictures.

Design choices
- It is conditional: beside a picture it sees what the published decoder makes of the same latents, so that it judges
  the details that were added (Isola et al. 2017, arXiv 1611.07004). Without the condition it stayed at chance.
- It scores patches of two sizes. It is training state, not published.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Discriminator(nn.Module):
    """Scores patches (about 20 and 60 pixels wide) of pictures as rendered (above 0) or decoded (below)."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96)) -> None:
        super().__init__()
        half, quarter, eighth = widths
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(24, half, 3, padding=1), nn.LeakyReLU(0.2)),
                nn.Sequential(_conv(half, quarter, stride=2), _conv(quarter, quarter)),
                nn.Sequential(_conv(quarter, eighth, stride=2), _conv(eighth, eighth)),
            ]
        )
        self.scores = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths[1:])

    def forward(
        self, pictures_BCHW: torch.Tensor, before_BCHW: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Scores (B, H, W) of the two scales, and the features of the three stages, for pictures in [-1, 1].

        Args:
            pictures_BCHW: Renders, or decoded pictures.
            before_BCHW: What the published decoder makes of the same latents.
        """
        x_BCHW = torch.cat([pictures_BCHW - before_BCHW, before_BCHW], 1)
        features = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            features.append(x_BCHW)
        return [score(x)[:, 0].float() for score, x in zip(self.scores, features[1:], strict=True)], features


def _conv(wide_in: int, wide_out: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(8, wide_out), nn.LeakyReLU(0.2))
