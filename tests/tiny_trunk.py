"""A tiny trunk with random weights, and inputs for it."""

from __future__ import annotations

import torch

CONFIG = {"vocabulary_size": 40, "width": 32, "depth": 3, "heads": 2, "latent_channels": 4, "latent_size": 4}


TOKENS, WIDTH = 16, 32


def awake(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter moved, since much starts at zero and would hide mistakes."""
    for parameter in module.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return module.eval()


def some_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 40, (batch, length))


def some_latents(batch: int) -> torch.Tensor:
    return torch.randn(batch, 4, 4, 4)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)
