"""The code head: from one picture token's feature to its 16 codes, one channel after the other.

Design choices
- TokenBridge's head (Wang et al. 2025, arXiv 2503.16430): a small causal transformer over the channels of one token, in
  the bridge's measured order (falling low-frequency energy, so that what matters most is decided first).
- adaLN is conditioned on the trunk's feature only: there is no timestep, neither in training nor in sampling.
  adaLN is computed once a token, not once a channel, so its parameters are nearly free.
- A code enters as a learned row of its channel's table, which starts as smooth waves over the levels: neighbouring
  levels start with similar rows, as their dequantized values are similar. A row identifies its channel, so no position
  embeddings are added.
- Every channel has output weights of its own, multiplied in fp32 whatever the rest runs in, and the noise of sampling
  is an input: a batch of another size then samples the same codes.

Legend: N tokens, K channels, V levels, D feature width, W head width, H heads, E = W / H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from mm.layers.entry_points import ForwardMixin, entry_point
from mm.models import layers

# Keys and values of the channels decided so far, each (N, K, H, E), filled in place.
Memory = tuple[torch.Tensor, torch.Tensor]


def smooth_rows(channels: int, levels: int, like: torch.Tensor, rms: float = 0.5) -> torch.Tensor:
    """Start of the table (K * V, W): random mixtures of cosines over a channel's levels, slow ones strongest."""
    waves = torch.arange(1, 9, device=like.device, dtype=torch.float32)
    places = (torch.arange(levels, device=like.device, dtype=torch.float32) + 0.5) / levels
    basis_VF = torch.cos(math.pi * places[:, None] * waves) / waves
    mixture_KFW = torch.randn(channels, len(waves), like.shape[1], device=like.device, dtype=torch.float32)
    rows = (basis_VF @ mixture_KFW).flatten(0, 1)
    return (rows * rms / rows.square().mean().sqrt()).to(like.dtype)


class CodeLayer(ForwardMixin, nn.Module):
    """Causal attention over channels and feed-forward, both modulated by the token's feature."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm_1 = layers.Norm(width)
        self.attn = layers.SelfProjections(width, heads)
        self.norm_2 = layers.Norm(width)
        self.ff = layers.FeedForward(width, ratio)
        self.modulation = nn.Linear(width, 6 * width)

    @entry_point
    def modulate(self, condition_NW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift, 1 + scale and gate (N, 1, W) of attention, then of the feed-forward.

        1 is added here, once a token, and not in `forward`, which runs once a channel.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(condition_NW)[:, None].chunk(6, -1)
        return shift_a, 1 + scale_a, gate_a, shift_f, 1 + scale_f, gate_f

    def forward(
        self, x_NKW: torch.Tensor, mod: tuple[torch.Tensor, ...], mask: torch.Tensor | None, memory: Memory | None
    ) -> torch.Tensor:
        """With `memory`, x holds the newest channels only and the memory (cut to the channels so far) gets theirs."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = mod
        q, k, v = self.attn(torch.addcmul(shift_a, self.norm_1(x_NKW), scale_a))
        if memory is not None:
            for stored, new in zip(memory, (k, v), strict=True):
                stored[:, -x_NKW.shape[1] :] = new
            k, v = memory
        x_NKW = torch.addcmul(x_NKW, gate_a, self.attn.to_out(layers.attend(q, k, v, mask)))
        return torch.addcmul(x_NKW, gate_f, self.ff(torch.addcmul(shift_f, self.norm_2(x_NKW), scale_f)))


class CodeHead(ForwardMixin, ModelMixin, ConfigMixin):
    """Logits over the levels of every channel of a token, each given the channels before it."""

    _no_split_modules = ["CodeLayer"]  # noqa: RUF012
    _repeated_blocks = ["CodeLayer"]  # noqa: RUF012

    channel_order: torch.Tensor

    @register_to_config
    def __init__(
        self,
        *,
        order: Sequence[int] = tuple(range(16)),
        levels: int = 64,
        feature_width: int = 256,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 3,
    ) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order must name every channel from 0 to {len(order) - 1} once, not {list(order)}")
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads ({heads})")
        self.channels = len(order)
        self.register_buffer("channel_order", torch.tensor(list(order)), persistent=False)
        self.start = nn.Parameter(torch.zeros(width))
        self.known = nn.Embedding(self.channels * levels, width)
        self.feature_in = nn.Linear(feature_width, width)
        self.layers = nn.ModuleList(CodeLayer(width, heads, ratio) for _ in range(depth))
        self.norm_out = layers.Norm(width)
        self.modulation_out = nn.Linear(width, 2 * width)
        # In the order of decisions, not of channels.
        self.out_weight = nn.Parameter(torch.zeros(self.channels, width, levels))
        self.out_bias = nn.Parameter(torch.zeros(self.channels, levels))
        self._init_weights()

    def _init_weights(self) -> None:
        layers.init_linears(self)
        nn.init.normal_(self.start, std=0.5)
        self.known.weight.data += smooth_rows(self.channels, self.config.levels, self.known.weight)
        layers.zero(self.modulation_out)
        for layer in self._stack:
            # As in the velocity decoder: gates open, projections at zero.
            layers.zero(layer.modulation, layer.attn.to_out, layer.ff.down)
            gates = layer.modulation.bias.data.view(6, -1)
            gates[2].fill_(1.0)
            gates[5].fill_(1.0)

    @property
    def _stack(self) -> list[CodeLayer]:
        return cast("list[CodeLayer]", self.layers)  # a ModuleList has no element type

    def forward(self, features_ND: torch.Tensor, codes_NK: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, V) in fp32 for tokens whose codes are known (training); channel by channel as in `codes`.

        `features` are the trunk's, `codes` int64 in natural channel order. Raises ValueError on wrong shapes or codes.
        """
        self._check(features_ND, codes_NK)
        condition = self._condition(features_ND)
        rows = (codes_NK + self._first_rows())[:, self.channel_order[:-1]]
        start = self.start.expand(len(rows), 1, -1)
        x_NKW = torch.cat([start, self.known(rows)], 1).to(condition.dtype)
        mask = torch.ones(self.channels, self.channels, dtype=torch.bool, device=x_NKW.device).tril()
        for layer in self._stack:
            x_NKW = layer(x_NKW, layer.modulate(condition), mask, None)
        logits_KNV = self._logits(x_NKW, self._modulate_out(condition), slice(None))
        # unbind and stack, since the backward of an index is slow on CPUs.
        decided = logits_KNV.unbind(0)
        return torch.stack([decided[self.config.order.index(channel)] for channel in range(self.channels)], 1)

    @entry_point
    @torch.no_grad()
    def sample(
        self,
        features_ND: torch.Tensor,
        gumbel_NKV: torch.Tensor,
        *,
        temperature: float = 1.0,
        empty_ND: torch.Tensor | None = None,
        guidance: float = 1.0,
    ) -> torch.Tensor:
        """Codes (N, K), int64: the argmax of logits + temperature * gumbel, channel after channel.

        With Gumbel noise that is sampling at that temperature; 0 takes the likeliest code. With `empty` (the features
        of the same tokens under the empty prompt) logits = empty + guidance * (prompted - empty). To guide features
        instead, as TokenBridge does, mix them before the call. Raises ValueError on wrong shapes or temperature.
        """
        return self._sample(features_ND, gumbel_NKV, temperature, empty_ND, guidance)[0]

    @entry_point
    @torch.no_grad()
    def sample_with_likelihood(
        self, features_ND: torch.Tensor, gumbel_NKV: torch.Tensor, *, temperature: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `sample`; also the log-probability (N, K), in the order of decisions, of each code at temperature 1."""
        codes_NK, logits = self._sample(features_ND, gumbel_NKV, temperature, None, 1.0)
        ordered_NK = codes_NK[:, self.channel_order]
        return codes_NK, torch.stack(logits, 1).log_softmax(-1).gather(-1, ordered_NK[..., None])[..., 0]

    def _sample(
        self,
        features_ND: torch.Tensor,
        gumbel_NKV: torch.Tensor,
        temperature: float,
        empty_ND: torch.Tensor | None,
        guidance: float,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Codes (N, K), and the logits (N, V) of each decision."""
        self._check_sampling(features_ND, gumbel_NKV, temperature, empty_ND)
        features = features_ND if empty_ND is None else torch.cat([features_ND, empty_ND])
        condition = self._condition(features)
        mods, mod_out = [layer.modulate(condition) for layer in self._stack], self._modulate_out(condition)
        shape = (2, len(features), self.channels, self.config.heads, self.config.width // self.config.heads)
        memories = [condition.new_empty(shape) for _ in self._stack]
        codes_NK = torch.empty(gumbel_NKV.shape[:2], dtype=torch.int64, device=features.device)
        decided: list[torch.Tensor] = []
        x_N1W = self.start.expand(len(features), 1, -1).to(condition.dtype)
        for place, channel in enumerate(self.config.order):
            for layer, mod, memory in zip(self._stack, mods, memories, strict=True):
                keys, values = memory[:, :, : place + 1]
                x_N1W = layer(x_N1W, mod, None, (keys, values))
            logits = self._logits(x_N1W, mod_out, slice(place, place + 1))[0]
            if empty_ND is not None:
                prompted, empty = logits.chunk(2)
                logits = torch.lerp(empty, prompted, guidance)
            decided.append(logits)
            codes = (logits + temperature * gumbel_NKV[:, channel].float()).argmax(-1)
            codes_NK[:, channel] = codes
            rows = (codes + channel * self.config.levels).repeat(len(features) // len(codes))
            x_N1W = self.known(rows)[:, None].to(condition.dtype)
        return codes_NK, decided

    def _condition(self, features_ND: torch.Tensor) -> torch.Tensor:
        return F.silu(self.feature_in(features_ND))

    def _first_rows(self) -> torch.Tensor:
        """Where each channel's rows begin in the table (K,)."""
        return torch.arange(self.channels, device=self.start.device) * self.config.levels

    def _modulate_out(self, condition_NW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and 1 + scale (N, 1, W) of the last norm."""
        shift, scale = self.modulation_out(condition_NW)[:, None].chunk(2, -1)
        return shift, 1 + scale

    def _logits(self, x_NKW: torch.Tensor, mod: tuple[torch.Tensor, torch.Tensor], places: slice) -> torch.Tensor:
        """Logits (places, N, V) of the channels decided at `places`, in fp32 even under autocast."""
        shift, scale = mod
        x_KNW = torch.addcmul(shift, self.norm_out(x_NKW), scale).transpose(0, 1)
        with torch.autocast(x_KNW.device.type, enabled=False):
            bias_K1V = self.out_bias[places, None].float()
            return torch.baddbmm(bias_K1V, x_KNW.float(), self.out_weight[places].float())

    def _check(self, features_ND: torch.Tensor, codes_NK: torch.Tensor) -> None:
        need, levels = (len(features_ND), self.channels), self.config.levels
        if codes_NK.shape != need:
            raise ValueError(f"codes of shape {tuple(codes_NK.shape)}; these features need {need}")
        # A wrong code would read another channel's row. Asking a GPU would make the CPU wait for it at every step.
        if codes_NK.device.type == "cpu" and codes_NK.numel() and not 0 <= codes_NK.min() <= codes_NK.max() < levels:
            raise ValueError(f"codes from {codes_NK.min()} to {codes_NK.max()}; they must lie in 0 to {levels - 1}")

    def _check_sampling(
        self, features_ND: torch.Tensor, gumbel_NKV: torch.Tensor, temperature: float, empty_ND: torch.Tensor | None
    ) -> None:
        need = (len(features_ND), self.channels, self.config.levels)
        if gumbel_NKV.shape != need:
            raise ValueError(f"gumbel of shape {tuple(gumbel_NKV.shape)}; these features need {need}")
        if temperature < 0:
            raise ValueError(f"temperature {temperature} must not be negative; 0 takes the likeliest code")
        if empty_ND is not None and empty_ND.shape != features_ND.shape:
            raise ValueError(f"empty features {tuple(empty_ND.shape)} must match features {tuple(features_ND.shape)}")
