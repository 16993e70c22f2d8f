"""Connectors: grids of picture tokens become the trunk's understanding tokens ("looks").

Design choices
- Two by two neighbours are merged into one look, so that a picture costs a text of 16 words and not of 64.
- One class for both sources: the understanding encoder's tokens (a picture from outside) and generation latents (a
  picture that was drawn in the conversation goes back without being decoded, as in CLEAR, arXiv 2604.04780).
- A GELU MLP, as in ETT (arXiv 2505.10562), plus a learned place a look.

This module does not know where tokens come from or what words stand around them.
Legend: B batch, L = side * side tokens, C channels, S = (side / 2)^2 looks, D trunk width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from mm.models import layers


class Connector(ModelMixin, ConfigMixin):
    """An MLP over merged tokens."""

    @register_to_config
    def __init__(self, *, in_channels: int, width: int = 256, hidden: int = 256, side: int = 8) -> None:
        super().__init__()
        if side % 2:
            raise ValueError(f"side {side} must be even: tokens are merged two by two")
        self.norm = layers.Norm(4 * in_channels)
        self.up = nn.Linear(4 * in_channels, hidden)
        self.down = nn.Linear(hidden, width)
        self.place = nn.Parameter(torch.zeros((side // 2) ** 2, width))
        layers.init_linears(self)
        nn.init.normal_(self.place, std=0.02)

    @property
    def looks(self) -> int:
        """Looks a picture."""
        return self.place.shape[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Looks (B, S, D) of tokens (B, L, C) or of latents (B, C, side, side)."""
        side, channels = self.config.side, self.config.in_channels
        x_BLC = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
        if x_BLC.shape[1:] != (side * side, channels):
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}; this connector reads {side * side} of {channels}")
        half = side // 2
        x = x_BLC.view(-1, half, 2, half, 2, channels).transpose(2, 3).reshape(-1, half * half, 4 * channels)
        return self.down(F.gelu(self.up(self.norm(x)))) + self.place.to(x.dtype)
