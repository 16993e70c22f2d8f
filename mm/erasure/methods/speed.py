"""SPEED (ICLR 2026): the change lies in the null space of what is retained, in values alone."""

from __future__ import annotations

from typing import Any

from mm.adapters.entry import Entry
from mm.core.nouns import counted
from mm.erasure import solver
from mm.erasure.methods.protocol import Job, Made
from mm.erasure.methods.uce import UCE, lowrank_entries


class SPEED(UCE):
    """Null-space constrained editing of the value maps."""

    name = "speed"
    defaults: dict[str, Any] = {"threshold": 1e-3, "rank": 64, "values_only": True}  # noqa: RUF012

    def make(self, job: Job) -> Made:
        """As UCE, for the layers that give values; where keys and values are one layer, for that."""
        groups = [[p for p in group if not job.settings["values_only"] or not _is_key(p)] for group in job.groups]
        entries: dict[str, Entry] = {}
        facts: dict[str, dict[str, float]] = {}
        for k, (whole, group) in enumerate(zip(job.groups, groups, strict=True)):
            features = job.features[whole[0]]
            found = solver.null_space(features, threshold=job.settings["threshold"])
            made, facts[whole[0]] = lowrank_entries(job, group, found, features)
            entries |= made
            job.progress((k + 1) / len(groups), f"{k + 1} of {counted(len(groups), 'group')} of layers")
        return Made(entries=entries, report={"groups": facts})


def _is_key(path: str) -> bool:
    return path.rpartition(".")[2] in ("to_k", "to_k_pic", "add_k_proj")
