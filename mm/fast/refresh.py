"""At which steps shared features are computed again, by dynamic programming.

DDT (Wang et al. 2025, arXiv 2504.05741) shares its encoder's features between sampling steps. With S[l][j] the mean
cosine of the features at steps l and j, measured once, step l costs 1 - S[l][j] where it uses the features of step j.
The best `count` steps follow from C_k[i] = min_j C_{k-1}[j] + sum_{l=j}^{i-1} (1 - S[l][j]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from mm.core.errors import UserError
from mm.core.nouns import counted


def refresh_steps(
    similarity: Sequence[Sequence[float]], count: int, weights: Sequence[float] | None = None
) -> tuple[int, ...]:
    """The `count` steps at which to compute features, so that sharing them costs the least similarity.

    Args:
        similarity: S, of all pairs of steps; row l and column j.
        count: How many of the steps compute features; the first always does.
        weights: What an error at each step counts; None: all the same.

    Returns:
        The steps in ascending order, from 0.

    Raises:
        UserError: S is not square, there are fewer steps than `count`, or not as many weights.
    """
    n = len(similarity)
    if any(len(row) != n for row in similarity):
        raise UserError(
            f"similarity has {counted(n, 'row')} of {sorted({len(row) for row in similarity})} values; give a square"
        )
    if not 1 <= count <= n:
        raise UserError(f"count is {count}; give 1 to {n}, the number of steps")
    if weights is not None and len(weights) != n:
        raise UserError(f"{counted(len(weights), 'weight')} for {counted(n, 'step')}; give one for each")
    counts = [1.0] * n if weights is None else weights
    # lost[j][i - j - 1]: what steps j to i - 1 lose by using the features of step j
    lost = [
        list(accumulate(counts[step] * (1 - similarity[step][start]) for step in range(start, n))) for start in range(n)
    ]
    best = [0.0] + [math.inf] * n  # C_{k-1}[i]: the first i steps are served by k - 1 refreshes
    chosen: list[list[int]] = []
    for _ in range(count):
        options = [
            [(best[start] + lost[start][end - start - 1], start) for start in range(end)] or [(math.inf, 0)]
            for end in range(n + 1)
        ]
        found = [min(row) for row in options]
        best = [cost for cost, _ in found]
        chosen.append([start for _, start in found])
    steps, end = [], n
    for starts in reversed(chosen):
        end = starts[end]
        steps.append(end)
    return tuple(reversed(steps))
