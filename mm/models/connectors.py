"""Connectors: grids of picture tokens become the trunk's understanding tokens ("looks").

Design choices
- Two by two neighbours are merged into one look, so that a picture costs a text of 16 words and not of 64.
- One class for every source: the understanding encoder's tokens (of a picture from outside, or of one that was drawn),
  and latents as they are, in studies of tokenizers.
- A GELU MLP, as in ETT (arXiv 2505.10562), plus a learned place a look.
- `Alike` adds to each look how many looks show the same thing as it does. Softmax attention averages what it reads, so
  a reader counted by heart: it said the numbers in which it had seen an object before. Here pairs are compared and
  summed, and the number enters by one table for all objects.

This module does not know where tokens come from or what words stand around them.
Legend: B batch, L = side * side tokens, C channels, S = (side / 2)^2 looks, D trunk width, H hidden width, E keys'
width, K = 6 numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from mm.models import layers


class Alike(nn.Module):
    """How many looks hold the centre of a thing of the same kind as each look does."""

    def __init__(self, hidden: int, keys: int, width: int, most: int = 6) -> None:
        super().__init__()
        self.key_out = nn.Linear(hidden, keys)
        self.centre_out = nn.Linear(hidden, 1)
        self.sharpness = nn.Parameter(torch.tensor([8.0, -4.0]))
        self.number_out = nn.Linear(most, width, bias=False)
        self.most = most

    def forward(self, states_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Kinship (B, S, S) in [0, 1], the diagonal being "holds a centre", and what to add to the looks (B, S, D)."""
        keys_BSE = F.normalize(self.key_out(states_BSH).float(), dim=-1)
        slope, offset = self.sharpness.float()
        same_BSS = (slope * keys_BSE @ keys_BSE.transpose(1, 2) + offset).sigmoid()
        centre_BS = self.centre_out(states_BSH).float().sigmoid().squeeze(-1)
        apart = ~torch.eye(same_BSS.shape[1], dtype=torch.bool, device=same_BSS.device)
        pairs_BSS = same_BSS * centre_BS[:, :, None] * centre_BS[:, None, :]
        kin_BSS = torch.where(apart, pairs_BSS, torch.diag_embed(centre_BS))
        steps = torch.arange(1, self.most + 1, device=kin_BSS.device)
        bumps_BSK = (1 - (kin_BSS.sum(-1, keepdim=True) - steps).abs()).clamp_min(0)
        return kin_BSS, self.number_out(bumps_BSK.to(states_BSH.dtype))


class Connector(ModelMixin, ConfigMixin):
    """An MLP over merged tokens; with `alike` (the width of its keys) looks know their number."""

    @register_to_config
    def __init__(self, *, in_channels: int, width: int = 256, hidden: int = 256, side: int = 8, alike: int = 0) -> None:
        super().__init__()
        if side % 2:
            raise ValueError(f"side {side} must be even: tokens are merged two by two")
        self.norm = layers.Norm(4 * in_channels)
        self.up = nn.Linear(4 * in_channels, hidden)
        self.down = nn.Linear(hidden, width)
        self.place = nn.Parameter(torch.zeros((side // 2) ** 2, width))
        self.counter = Alike(hidden, alike, width) if alike else None
        layers.init_linears(self)
        nn.init.normal_(self.place, std=0.02)
        if self.counter is not None:
            layers.zero(self.counter.number_out)  # looks start as they are without it

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
        states_BSH = F.gelu(self.up(self.norm(x)))
        looks_BSD = self.down(states_BSH) + self.place.to(x.dtype)
        return looks_BSD if self.counter is None else looks_BSD + self.counter(states_BSH)[1].to(x.dtype)
