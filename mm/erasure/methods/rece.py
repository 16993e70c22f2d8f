"""RECE (Gong et al., ECCV 2024, arXiv 2407.12383): UCE, then the embeddings that would bring the target back, in turn.

After an edit there may be other features c' whose keys and values come close to the target's old ones:
c' = (rho I + sum W'^T W')^-1 (sum W'^T W) c, over the layers that read c. They are erased as well, round by round.
"""

from __future__ import annotations

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
        s = job.settings
        weights = torch.cat([job.weights[path] for path in group])
        wide = features
        found = super().solve(job, group, features)
        for _ in range(int(s["rounds"])):
            derived = self._derived(weights, found.change_DD, features.target_TD, s["rho"])
            wide = solver.Features(
                target_TD=torch.cat([wide.target_TD, derived]),
                anchor_TD=torch.cat([wide.anchor_TD, features.anchor_TD]),
                retained_RD=features.retained_RD,
            )
            found = super().solve(job, group, wide)
        return solver.solution(
            features, found.change_DD, solver.moment(wide.target_TD) + solver.moment(wide.retained_RD)
        )

    @staticmethod
    def _derived(weight_ND: Tensor, change_DD: Tensor, target_TD: Tensor, rho: float) -> Tensor:
        """Features (T, D) whose outputs under the edited weights come closest to the target's old outputs."""
        edited = weight_ND + weight_ND @ change_DD
        gram = edited.T @ edited
        size = gram.diagonal().mean()
        system = gram + rho * size * torch.eye(gram.shape[0], dtype=gram.dtype)
        return target_TD @ torch.linalg.solve(system, edited.T @ weight_ND).T
