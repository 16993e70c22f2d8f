"""Connectors: grids of picture tokens become the trunk's understanding tokens ("looks").

Design choices
- Two by two neighbours are merged into one look, so that a picture costs a text of 16 words and not of 64.
- One class for every source: the understanding encoder's tokens (of a picture from outside, or of one that was drawn),
  and latents as they are, in studies of tokenizers.
- A GELU MLP, as in ETT (arXiv 2505.10562), plus a learned place a look.
- `Alike` counts, for each look, how many looks show the same thing as it does. Softmax attention averages what it
  reads, so a reader counted by heart: it said the numbers in which it had seen an object before. Here pairs are
  compared and summed, and the number goes beside the look, not into it: replies copy it (`mm.models.number_copy`).
  Added to the look, it was read together with what the look shows, by heart again.
- The counter learns in a stage of its own (`mm.training.counter_stage`), on nothing but pictures: its numbers cannot
  learn what words expect. Whoever trains words may tell the numbers instead.

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
from mm.models.number_copy import number_bumps


class Alike(nn.Module):
    """Which looks hold the centres of things of the same kind; `alike` is the width of the keys that are compared."""

    def __init__(self, in_channels: int, hidden: int, keys: int) -> None:
        super().__init__()
        self.norm = layers.Norm(in_channels)
        self.up = nn.Linear(in_channels, hidden)
        self.key_out = nn.Linear(hidden, keys)
        self.centre_out = nn.Linear(hidden, 1)
        self.sharpness = nn.Parameter(torch.tensor([8.0, -4.0]))

    def forward(self, merged_BSC: torch.Tensor) -> torch.Tensor:
        """Kinship (B, S, S) in [0, 1]; the diagonal is "holds a centre", and a row's sum how many are like it."""
        keys_BSE, centre_BS = self.keys(merged_BSC)
        same_BSS = self.same(keys_BSE).sigmoid()
        apart = ~torch.eye(same_BSS.shape[1], dtype=torch.bool, device=same_BSS.device)
        pairs_BSS = same_BSS * centre_BS[:, :, None] * centre_BS[:, None, :]
        return torch.where(apart, pairs_BSS, torch.diag_embed(centre_BS))

    def keys(self, merged_BSC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is compared (B, S, E), of length 1, and whether each look holds a centre (B, S) in [0, 1]."""
        states_BSH = F.gelu(self.up(self.norm(merged_BSC.to(self.up.weight.dtype))))
        keys_BSE = F.normalize(self.key_out(states_BSH).float(), dim=-1)
        return keys_BSE, self.centre_out(states_BSH).float().sigmoid().squeeze(-1)

    def same(self, keys_BSE: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, S) that two keys are of one kind."""
        slope, offset = self.sharpness.float()
        return slope * keys_BSE @ keys_BSE.transpose(-1, -2) + offset


def merged(tokens_BLC: torch.Tensor, side: int) -> torch.Tensor:
    """Two by two neighbours (B, S, 4 C) of a grid of tokens, row by row."""
    half, channels = side // 2, tokens_BLC.shape[-1]
    x = tokens_BLC.view(-1, half, 2, half, 2, channels).transpose(2, 3)
    return x.reshape(-1, half * half, 4 * channels)


class Connector(ModelMixin, ConfigMixin):
    """An MLP over merged tokens; with `alike` (the width of its counter's keys) looks bring their numbers."""

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int,
        width: int = 256,
        hidden: int = 256,
        side: int = 8,
        alike: int = 0,
        most: int = 6,
    ) -> None:
        super().__init__()
        if side % 2:
            raise ValueError(f"side {side} must be even: tokens are merged two by two")
        self.norm = layers.Norm(4 * in_channels)
        self.up = nn.Linear(4 * in_channels, hidden)
        self.down = nn.Linear(hidden, width)
        self.place = nn.Parameter(torch.zeros((side // 2) ** 2, width))
        self.counter = Alike(4 * in_channels, hidden, alike) if alike else None
        layers.init_linears(self)
        nn.init.normal_(self.place, std=0.02)

    @property
    def looks(self) -> int:
        """Looks a picture."""
        return self.place.shape[0]

    def forward(self, tokens: torch.Tensor, numbers_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Looks (B, S, D) of tokens (B, L, C) or of latents (B, C, side, side); with a counter (B, S, D + K).

        The last K are weights of numbers (`number_bumps`): of `numbers_BS`, how many are like each look, where they are
        known; otherwise the counter says.
        """
        side, channels = self.config.side, self.config.in_channels
        x_BLC = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
        if x_BLC.shape[1:] != (side * side, channels):
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}; this connector reads {side * side} of {channels}")
        x = merged(x_BLC, side)
        looks_BSD = self.down(F.gelu(self.up(self.norm(x)))) + self.place.to(x.dtype)
        if not self.config.alike:
            return looks_BSD
        bumps_BSK = number_bumps(self._counted(x) if numbers_BS is None else numbers_BS, self.config.most)
        return torch.cat([looks_BSD, bumps_BSK.to(looks_BSD.dtype)], -1)

    def _counted(self, merged_BSC: torch.Tensor) -> torch.Tensor:
        if self.counter is None:
            raise ValueError("this connector's counter was taken out: give it the numbers of the looks")
        return self.counter(merged_BSC).sum(-1)
