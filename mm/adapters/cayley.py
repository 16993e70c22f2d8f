"""Rotations in blocks from skew-symmetric matrices, as OFT of peft has them.

Sources: Qiu et al. 2023, OFT (arXiv 2306.07280), by Cayley's transform; Qiu et al. 2025 (arXiv 2506.19847), by a series
in place of it.

Legend: g blocks of b x b values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def side_of(values: int) -> int:
    """The side b of the block whose upper triangle has so many values; 0 where there is none."""
    side = (1 + math.isqrt(1 + 8 * values)) // 2
    return side if values > 0 and side * (side - 1) // 2 == values else 0


def turning(skew: Tensor, terms: int = 0) -> Tensor:
    """R^T - I (g, b, b): W (I + it) is the weight whose inputs are turned.

    Args:
        skew: rows of the upper triangles of Q, (g, b (b - 1) / 2).
        terms: of peft's series for R; 0 is Cayley's transform, (I - Q) (I + Q)^-1.
    """
    side = side_of(skew.shape[-1])
    upper = torch.triu_indices(side, side, 1, device=skew.device)
    full = skew.new_zeros(len(skew), side, side)
    full[:, upper[0], upper[1]] = skew
    full = full - full.transpose(1, 2)
    eye = torch.eye(side, dtype=skew.dtype, device=skew.device)
    rotation = _series(full, terms) if terms else torch.linalg.solve(eye + full, eye - full, left=False)
    return rotation.transpose(1, 2) - eye


def _series(skew: Tensor, terms: int) -> Tensor:
    """peft's: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), whose last term counts once; 3 terms are 4."""
    terms = 4 if terms == 3 else terms
    total, power = torch.eye(skew.shape[-1]).to(skew).expand_as(skew).clone(), skew
    for number in range(1, terms):
        total = total + power * (1.0 if number == terms - 1 and terms > 2 else 2.0)
        power = power @ skew
    return total
