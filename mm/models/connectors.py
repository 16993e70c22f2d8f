"""Connectors: from a grid of encoder tokens to the trunk's understanding tokens.

Design choices
- Two by two neighbouring tokens are merged into one understanding token, so that a picture costs 16 text positions
  instead of 64.
- One class for every source: tokens of the understanding encoder (of a given or of a drawn picture), and plain latents
  in the studies of tokenizers.
- A GELU MLP, as in ETT (arXiv 2505.10562), plus a learned position embedding per understanding token.
- `SameObjectCounter` predicts, for each understanding token, how many tokens show the same kind of object. Softmax
  attention averages what it attends to, so a model without a counter memorized the counts that it had seen per object.
  The counter compares pairs and sums. Its count is appended to the understanding token and copied by replies
  (`mm.models.number_copy`); added to the token's state it was memorized together with the object.
- The counter is trained in a stage of its own (`mm.training.counter_stage`) on pictures only, so that its counts do
  not depend on text. Training on text may override the counts.

Legend: B batch, L = side * side tokens, C channels, S = (side / 2)^2 understanding tokens, D trunk width, H hidden
width, E key width, K = 6 counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from torch import nn

from mm.layers.entry_points import ForwardMixin, entry_point
from mm.models import layers
from mm.models.number_copy import number_bumps


class SameObjectCounter(nn.Module):
    """Predicts which understanding tokens hold the centres of objects of the same kind.

    Args:
        in_channels: Width of the merged tokens.
        hidden: Width of the hidden layer.
        keys: Width of the keys that are compared.
    """

    def __init__(self, in_channels: int, hidden: int, keys: int) -> None:
        super().__init__()
        self.norm = layers.Norm(in_channels)
        self.up = nn.Linear(in_channels, hidden)
        self.key_out = nn.Linear(hidden, keys)
        self.centre_out = nn.Linear(hidden, 1)
        self.sharpness = nn.Parameter(torch.tensor([8.0, -4.0]))

    def forward(self, merged_BSC: torch.Tensor) -> torch.Tensor:
        """Probabilities (B, S, S) that two tokens hold centres of one kind.

        The diagonal is the probability that a token holds a centre. The sum of a row is the count of that token's kind.
        """
        keys_BSE, centre_BS = self.keys(merged_BSC)
        same_BSS = self.same_kind_logits(keys_BSE).sigmoid()
        apart = ~torch.eye(same_BSS.shape[1], dtype=torch.bool, device=same_BSS.device)
        pairs_BSS = same_BSS * centre_BS[:, :, None] * centre_BS[:, None, :]
        return torch.where(apart, pairs_BSS, torch.diag_embed(centre_BS))

    def keys(self, merged_BSC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (B, S, E) of length 1, and the probability (B, S) that each token holds a centre."""
        states_BSH = F.gelu(self.up(self.norm(merged_BSC.to(get_parameter_dtype(self.up)))))
        keys_BSE = F.normalize(self.key_out(states_BSH).float(), dim=-1)
        return keys_BSE, self.centre_out(states_BSH).float().sigmoid().squeeze(-1)

    def same_kind_logits(self, keys_BSE: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, S) that two keys belong to one kind."""
        slope, offset = self.sharpness.float()
        return slope * keys_BSE @ keys_BSE.transpose(-1, -2) + offset


def merged(tokens_BLC: torch.Tensor, side: int) -> torch.Tensor:
    """Concatenates two by two neighbours of a grid of tokens, row by row: (B, S, 4 C)."""
    half, channels = side // 2, tokens_BLC.shape[-1]
    x = tokens_BLC.view(-1, half, 2, half, 2, channels).transpose(2, 3)
    return x.reshape(-1, half * half, 4 * channels)


class Connector(ForwardMixin, ModelMixin, ConfigMixin):
    """An MLP over merged tokens.

    Args:
        in_channels: Width of the encoder's tokens.
        width: The trunk's width.
        hidden: Width of the hidden layer.
        side: Tokens on each side of the grid; even.
        counter_keys: Width of the counter's keys; 0 for a connector without a counter.
        max_count: The highest count that is appended to an understanding token.
        domain_rank: Directions of the statistics of training pictures (`domain_distance`); 0 for none.
    """

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int,
        width: int = 256,
        hidden: int = 256,
        side: int = 8,
        counter_keys: int = 0,
        max_count: int = 6,
        domain_rank: int = 0,
    ) -> None:
        super().__init__()
        if side % 2:
            raise ValueError(f"side {side} must be even: tokens are merged two by two")
        self.norm = layers.Norm(4 * in_channels)
        self.up = nn.Linear(4 * in_channels, hidden)
        self.down = nn.Linear(hidden, width)
        self.place = nn.Parameter(torch.zeros((side // 2) ** 2, width))
        self.counter = SameObjectCounter(4 * in_channels, hidden, counter_keys) if counter_keys else None
        layers.init_linears(self)
        nn.init.normal_(self.place, std=0.02)
        if domain_rank:  # `mm.evaluation.outside` writes them
            self.register_buffer("domain_mean", torch.zeros(in_channels))
            self.register_buffer("domain_basis", torch.zeros(domain_rank, in_channels))
            self.register_buffer("domain_limit", torch.ones(1))

    @property
    def tokens_per_picture(self) -> int:
        """How many understanding tokens a picture has."""
        return self.place.shape[0]

    def forward(self, tokens: torch.Tensor, count_override_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Understanding tokens of one or more pictures.

        Args:
            tokens: Encoder tokens (B, L, C), or latents (B, C, side, side).
            count_override_BS: Counts used in place of the counter's.

        Returns:
            (B, S, D), or with a counter (B, S, D + K): the last K are the weights of the counts (`number_bumps`).

        Raises:
            ValueError: On another shape, or where counts are needed and there is neither a counter nor an override.
        """
        side, channels = self.config.side, self.config.in_channels
        x_BLC = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
        if x_BLC.shape[1:] != (side * side, channels):
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}; this connector reads {side * side} of {channels}")
        x = merged(x_BLC, side)
        tokens_BSD = self.down(F.gelu(self.up(self.norm(x)))) + self.place.to(x.dtype)
        if not self.config.counter_keys:
            return tokens_BSD
        counts_BS = self._count(x) if count_override_BS is None else count_override_BS
        return torch.cat([tokens_BSD, number_bumps(counts_BS, self.config.max_count).to(tokens_BSD.dtype)], -1)

    def _count(self, merged_BSC: torch.Tensor) -> torch.Tensor:
        if self.counter is None:
            raise ValueError("this connector's counter was removed; pass count_override_BS")
        return self.counter(merged_BSC).sum(-1)

    @entry_point
    def domain_distance(self, tokens_BLC: torch.Tensor) -> torch.Tensor | None:
        """How far pictures are from those that the encoder was trained on; None for a connector without statistics.

        The mean token's part outside of the principal subspace of training pictures, squared, over the limit that one
        in a hundred of them exceeds (residual of PCA, Jackson and Mudholkar 1979). It needs no picture from outside to
        be set.

        Args:
            tokens_BLC: Of the understanding encoder (B, L, C).

        Returns:
            (B,), above 1 for pictures from outside.
        """
        if not self.config.domain_rank:
            return None
        q_CR = torch.linalg.qr(self.get_buffer("domain_basis").float().T)[0]  # 16-bit directions are not orthogonal
        x_BC = tokens_BLC.float().mean(1) - self.get_buffer("domain_mean").float()
        rest_BC = x_BC - x_BC @ q_CR @ q_CR.T
        return rest_BC.square().sum(1) / self.get_buffer("domain_limit").float()
