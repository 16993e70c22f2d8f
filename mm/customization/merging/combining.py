"""How changes of one layer become one, by method.

Design choices
- Plain sums of products stay products: the ranks add up, and nothing is lost. The other methods work on whole changes,
  which are then cut to a rank; what that loses is reported.
- TIES (Yadav et al. 2023, arXiv 2306.01708) and DARE (Yu et al. 2023, arXiv 2311.03099) are peft's.
- DO-Merging (Zheng et al. 2025, arXiv 2505.15875): a change is split into the norms of its rows and their directions.
  Directions are pushed apart by a small correction, found without data by gradient descent; norms are averaged apart
  from them, so that an adapter with large values does not drown the others.

Legend: N outputs, K inputs, r rank, A adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DIRECT = 1024  # up to so many rows or columns, the decomposition is exact
Combine = Callable[[Sequence[Tensor], Sequence[float], float, int], Tensor]


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float, seed: int) -> Tensor:
    """Trims, elects signs, and averages what agrees."""
    from peft.utils.merge_utils import ties as of_peft

    return of_peft(list(deltas), torch.tensor(list(weights)), density)


def dare(deltas: Sequence[Tensor], weights: Sequence[float], density: float, seed: int) -> Tensor:
    """Drops values at random and scales the rest up."""
    from peft.utils.merge_utils import dare_linear

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dare_linear(list(deltas), torch.tensor(list(weights)), density)


def decoupled_orthogonal(deltas: Sequence[Tensor], weights: Sequence[float], density: float, seed: int) -> Tensor:
    """Norms and directions apart, the latter orthogonal; `density` and `seed` are not used."""
    norms = [delta.norm(dim=1, keepdim=True) for delta in deltas]
    directions = orthogonalized([delta / norm.clamp_min(1e-12) for delta, norm in zip(deltas, norms, strict=True)])
    # One norm a row for all: the mean over the adapters that change the row.
    present = torch.stack([(norm > 0).float() for norm in norms])
    mean = torch.stack(norms).sum(0) / present.sum(0).clamp_min(1)
    return mean * sum(
        (weight * direction * one for weight, direction, one in zip(weights, directions, present, strict=True)),
        torch.zeros_like(deltas[0]),
    )


def orthogonalized(
    directions: Sequence[Tensor], *, steps: int = 100, rate: float = 0.1, hold: float = 0.05
) -> list[Tensor]:
    """Rows moved as little as need be until those of different adapters are nearly orthogonal.

    Minimizes the mean squared inner product of rows of different adapters plus `hold` times the squared correction.
    """
    start = torch.stack(list(directions))
    moved = start.clone()
    count = len(directions)
    if count < 2:
        return list(directions)
    velocity = torch.zeros_like(moved)
    for _ in range(steps):
        inner = torch.einsum("ank,bnk->nab", moved, moved)
        inner = inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))
        slope = torch.einsum("nab,bnk->ank", inner, moved) + hold * (moved - start)
        velocity = 0.9 * velocity - rate * slope
        moved = moved + velocity
    return list(moved)


COMBINING: dict[str, Combine] = {"ties": ties, "dare": dare, "do": decoupled_orthogonal}


def cut(delta_NK: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best product of a rank: down (r, K), up (N, r), and the share of the norm that is lost (Eckart-Young)."""
    if min(delta_NK.shape) <= _DIRECT:
        left, sizes, right = torch.linalg.svd(delta_NK, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left, sizes, turned = torch.svd_lowrank(delta_NK, q=min(rank + 16, *delta_NK.shape), niter=4)
        right = turned.T
    root = sizes[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    lost = float((delta_NK - up @ down).norm() / delta_NK.norm().clamp_min(1e-30))
    return down, up, lost
