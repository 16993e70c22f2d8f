"""What tiny random denoisers are made with: the table of builders, and tensors of one call (`tiny_families`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

WORDS = 5
Made = tuple[nn.Module, dict[str, Any]]
TINY: dict[str, Callable[[], Made]] = {}


def normal(*shape: int) -> torch.Tensor:
    """Normal values, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tiny(make: Callable[[type], Made]) -> Callable[[type], Made]:
    """Registers a builder under the name of diffusers' class that its own name is."""
    name = make.__name__

    def build() -> Made:
        torch.manual_seed(0)
        model, inputs = make(getattr(diffusers, name))
        for parameter in model.parameters():
            if parameter.numel() and not 1e-3 < parameter.abs().max() < 1e3:  # zeros, or memory that was never written
                nn.init.normal_(parameter, std=0.1)
        return model.eval().requires_grad_(False), inputs

    TINY[name] = build
    return make


def positions(tokens: int, axes: int = 3) -> torch.Tensor:
    """Position ids of tokens."""
    return torch.arange(tokens)[:, None].expand(tokens, axes).float() % 4


def timestep(value: float = 0.5) -> torch.Tensor:
    """One timestep."""
    return torch.tensor([value])


def unmasked(words: int = WORDS) -> torch.Tensor:
    """A mask that hides no word."""
    return torch.ones(1, words, dtype=torch.long)
