"""UCE, Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761): one closed form for all targets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mm.adapters.entry import Entry
from mm.core.nouns import counted
from mm.erasure import solver
from mm.erasure.methods.protocol import Job, Made

RANK_A_TARGET = 8  # added for every further target


class UCE:
    """W' = W (I + A) at every text-reading layer."""

    name = "uce"
    defaults: dict[str, Any] = {"preserve": 1.0, "ridge": 1e-3, "rank": 64}  # noqa: RUF012

    def make(self, job: Job) -> Made:
        """One solution for each group of layers that read the same features."""
        entries: dict[str, Entry] = {}
        solutions: dict[str, dict[str, float]] = {}
        for k, group in enumerate(job.groups):
            features = job.features[group[0]]
            found = self.solve(job, group, features)
            made, facts = lowrank_entries(job, group, found, features)
            entries |= made
            solutions[group[0]] = facts
            job.progress((k + 1) / len(job.groups), f"{k + 1} of {counted(len(job.groups), 'group')} of layers")
        return Made(entries=entries, report={"groups": solutions})

    def solve(self, job: Job, group: Any, features: solver.Features) -> solver.Solution:
        """A for one group."""
        return self.ridge(job, features.moments)

    def ridge(self, job: Job, moments: solver.Moments) -> solver.Solution:
        """A for given moments, by the job's settings; each target counts as much as one alone would."""
        s = job.settings
        return solver.ridge(moments, strength=float(job.targets), preserve=s["preserve"], ridge=s["ridge"])


def lowrank_entries(
    job: Job, group: Any, found: solver.Solution, features: solver.Features
) -> tuple[dict[str, Entry], dict[str, float]]:
    """Low-rank entries for a group: `down` is shared, `up` is W times A's left factor."""
    rank = int(job.settings["rank"]) + RANK_A_TARGET * (job.targets - 1)
    m = features.moments
    up, down, lost = solver.low_rank(found.change_DD * job.strength, m.target_DD + m.kept_DD, rank)
    entries = {path: entry_of(job.weights[path] @ up, down) for path in group}
    facts = {
        "condition": found.condition, "target_error": found.target_error, "retained_error": found.retained_error,
        "rank": float(down.shape[0]), "truncation_lost": lost,
    }  # fmt: skip
    return entries, facts


def entry_of(up_Nr: Tensor, down_rD: Tensor) -> Entry:
    """A low-rank entry in float32."""
    return Entry(kind="lowrank", tensors={"down": down_rD.float().contiguous(), "up": up_Nr.float().contiguous()})
