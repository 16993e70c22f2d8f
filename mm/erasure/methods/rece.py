"""RECE (Gong et al., ECCV 2024, arXiv 2407.12383): UCE, then the embeddings that would bring the target back, in turn.

After an edit there may be other features c' whose keys and values come close to the target's old ones:
c' = (rho I + sum W'^T W')^-1 (sum W'^T W) c, over the layers that read c. They are erased as well, round by round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.erasure import solver
from mm.erasure.methods.protocol import Job
from mm.erasure.methods.uce import UCE


class RECE(UCE):
    """UCE with rounds of derived features."""

    name = "rece"
    defaults: dict[str, Any] = {**UCE.defaults, "rounds": 3, "rho": 0.1}  # noqa: RUF012

    def solve(self, job: Job, group: Any, features: solver.Features) -> solver.Solution:
        """The solution after all rounds; its errors are those on the features that were given."""
        s, given = job.settings, features.moments
        weights = torch.cat([job.weights[path] for path in group])
        maps: list[Tensor] = []  # from a target's token to the tokens that bring it back
        found = self.ridge(job, given)
        for _ in range(int(s["rounds"])):
            maps.append(derived(weights, found.change_DD, s["rho"]))
            wide = widened(given, maps)
            found = self.ridge(job, wide)
        return solver.solution(given, found.change_DD, solver.moments_of(wide if maps else given).target_DD)


def derived(weight_ND: Tensor, change_DD: Tensor, rho: float) -> Tensor:
    """The map K, (D, D), to features K c whose outputs under the edited weights come closest to c's old outputs."""
    edited = weight_ND + weight_ND @ change_DD
    gram = edited.T @ edited
    size = gram.diagonal().mean()
    system = gram + rho * size * torch.eye(gram.shape[0], dtype=gram.dtype)
    return torch.linalg.solve(system, edited.T @ weight_ND)


def widened(given: solver.Moments, maps: Sequence[Tensor]) -> solver.Moments:
    """Moments of the target's tokens c together with K c for each map K, all of which go to the anchor's tokens c*."""
    to_anchor = given.cross_DD + given.target_DD  # E[c* c^T]
    target, cross, gap = given.target_DD, given.cross_DD, given.gap
    anchor = given.gap + 2 * float(given.cross_DD.trace()) + float(given.target_DD.trace())  # E|c*|^2
    for k in maps:
        second = k @ given.target_DD @ k.T
        reached = to_anchor @ k.T
        target, cross = target + second, cross + reached - second
        gap += anchor - 2 * float(reached.trace()) + float(second.trace())
    n = 1 + len(maps)
    return solver.Moments(target_DD=target / n, cross_DD=cross / n, gap=gap / n, retained_DD=given.retained_DD)
