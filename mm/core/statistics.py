"""Shares of yes/no verdicts and paired changes, with their 95 % intervals.

Design choices
- Wilson's interval (Wilson 1927) stays valid near 0 and 1, where the normal one does not. Pictures of one prompt are
  counted as independent, so the interval is a little too narrow where a prompt decides more than chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

_Z = 1.959964


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of `hits` out of `n`; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(verdicts: Sequence[bool]) -> dict[str, Any]:
    """Score, n and interval of yes/no verdicts; the score of none is None."""
    hits, n = sum(verdicts), len(verdicts)
    low, high = wilson(hits, n)
    return {"score": round(hits / n, 4) if n else None, "n": n, "low": round(low, 4), "high": round(high, 4)}


def paired_change(
    before: Sequence[bool], after: Sequence[bool], clusters: Sequence[int], draws: int = 2000
) -> tuple[float, float, float]:
    """Mean change of paired verdicts and its 95 % interval, from resampling clusters (a prompt's pictures, say)."""
    if not len(before) == len(after) == len(clusters):
        raise ValueError(f"{len(before)}, {len(after)} and {len(clusters)} verdicts cannot be paired")
    index = torch.tensor(list(clusters))
    names, index = torch.unique(index, return_inverse=True)
    change = torch.tensor(list(after), dtype=torch.float64) - torch.tensor(list(before), dtype=torch.float64)
    sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, change)
    sizes = torch.bincount(index, minlength=len(names)).double()
    picks = torch.randint(len(names), (draws, len(names)), generator=torch.Generator().manual_seed(0))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(change.mean()), low, high
