"""A small block with attention and a feed-forward, inputs for it, and quick settings to quantize it with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mm.quantization.config import SVDQuantConfig


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs with a few loud and correlated channels, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, :: columns // 4] *= 20
    return x / columns**0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in ("to_q", "to_k", "to_v")})
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.lm_head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x) for layer in self.attn.values())
        x = x + F.scaled_dot_product_attention(q, k, v)
        return self.lm_head(x + self.down(F.silu(self.up(x))))


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


INPUTS = [{"x": correlated(9, 64, seed)[None]} for seed in range(6)]
SMALL = SVDQuantConfig(rank=4, iterations=5, rows=64)
