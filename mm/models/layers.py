"""Building blocks shared by trunk, velocity decoder and code head.

Design choices
- Pre-norm LayerNorm without bias, QK-norm, SiLU feed-forward; output projections start at zero, so that every block
  begins as the identity.
- Rotary positions: one axis for text, two for pictures (half of each head's channels for y, half for x).
- Attention goes through diffusers' dispatch, so that xformers or flash kernels are a setting, not a fork.
- Linears have the usual names (`to_q`, `to_k`, `to_v`, `to_out`, `up`, `down`), which adapters match.

Legend: B batch, L tokens, D width, H heads, E = D / H channels a head, M = 6 modulation vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn


class Norm(nn.Module):
    """LayerNorm without bias. Not RMSNorm: torch has a fused CPU kernel for this one, 4x faster both ways."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_D, self.weight.shape, self.weight.to(x_D.dtype), eps=1e-6)


def rotary_angles(positions: torch.Tensor, channels: int, base: float) -> torch.Tensor:
    """Angles (..., channels / 2) of rotary positions (...) (Su et al. 2021, arXiv 2104.09864)."""
    steps = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
    return positions.float()[..., None] * base**-steps


def picture_angles(height: int, width: int, channels: int, device: torch.device) -> torch.Tensor:
    """Two-axis rotary angles (height * width, channels / 2), row-major."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    half = channels // 2
    return torch.cat([rotary_angles(axis.flatten(), half, 100.0) for axis in (y, x)], -1)


def rotate(x_BLHE: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates channel pairs (first half, second half) by the angles (L, E / 2) or (B, L, E / 2) of their position."""
    cos, sin = (f(angles).to(x_BLHE.dtype).unsqueeze(-2) for f in (torch.cos, torch.sin))
    a, b = x_BLHE.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


AttentionCallback = Callable[[torch.Tensor], None]
_ATTENTION_CALLBACKS: list[AttentionCallback] = []


@contextmanager
def attention_callback(callback: AttentionCallback) -> Iterator[None]:
    """Within the context, `callback(attn_weights)` is called by every attention with gradients on a CPU.

    Args:
        callback: Receives weights (B, H, L, K) that are part of the graph, so that a loss can use them.
    """
    _ATTENTION_CALLBACKS.append(callback)
    try:
        yield
    finally:
        _ATTENTION_CALLBACKS.remove(callback)


def attend(
    q_BLHE: torch.Tensor, k_BKHE: torch.Tensor, v_BKHE: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Scaled dot-product attention -> (B, L, D); `mask` broadcasts to (B, H, L, K), True = may attend."""
    if q_BLHE.requires_grad and q_BLHE.device.type == "cpu":
        return _attend_by_products(q_BLHE, k_BKHE, v_BKHE, mask)
    return dispatch_attention_fn(q_BLHE, k_BKHE, v_BKHE, attn_mask=mask).flatten(2)


def _attend_by_products(
    q_BLHE: torch.Tensor, k_BKHE: torch.Tensor, v_BKHE: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`attend` as two products: at these lengths torch's flash backward on CPUs takes 3.6 times as long."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BKHE, v_BKHE))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + torch.where(mask, 0.0, -1e4).to(scores.dtype)
    weights = scores.softmax(-1)
    for callback in _ATTENTION_CALLBACKS:
        callback(weights)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class SelfProjections(nn.Module):
    """Queries, keys and values of one stream, split into heads and QK-normalized."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm_q = Norm(width // heads)
        self.norm_k = Norm(width // heads)

    def forward(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (f(x_BLD).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v


class FeedForward(nn.Module):
    """down(silu(up(x))). SiLU, since torch's gelu costs twice as much backward on CPUs."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x_BLD)))


class SigmaEmbedding(nn.Module):
    """A noise level in [0, 1] as a vector: sines of 1000 sigma through a small MLP."""

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.up = nn.Linear(2 * frequencies, width)
        self.down = nn.Linear(width, width)

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        """sigma (...) -> (..., D)."""
        steps = torch.arange(self.frequencies, device=sigma.device, dtype=torch.float32) / self.frequencies
        angles = 1000 * sigma.float()[..., None] * torch.exp(-math.log(10000) * steps)
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(get_parameter_dtype(self.up))
        return self.down(F.silu(self.up(waves)))


def modulate(x_BLD: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN's x * (1 + scale) + shift."""
    return torch.addcmul(shift, x_BLD, 1 + scale)


def zero(*modules: nn.Linear) -> None:
    """Sets the modules' weights (and biases) to zero."""
    for module in modules:
        nn.init.zeros_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_linears(model: nn.Module, std: float = 0.02) -> None:
    """Xavier-uniform linears, small normal embeddings; all initialization that is not zero happens here."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
