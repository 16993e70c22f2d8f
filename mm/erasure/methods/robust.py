"""The "robust" preset: the closed form, trained against an adversary that searches embeddings.

As adversarial training for unlearning (AdvUnlearn, Zhang et al. 2024, arXiv 2405.15234) alternates attack and erasure,
here each round optimizes embeddings that bring the target's old outputs back through the edited layers, and what these
layers read then is erased as well. RECE derives such features in closed form, without asking whether any text reaches
them; the adversary's features are reached by embeddings.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.erasure import solver
from mm.erasure.methods.adversary import adversarial_features
from mm.erasure.methods.protocol import Job, Made
from mm.erasure.methods.rece import derived, widened
from mm.erasure.methods.uce import UCE, lowrank_entries
from mm.erasure.methods.unlearning import unlearned


class Robust(UCE):
    """UCE with rounds of an embedding search; RECE's derived features count as well."""

    name = "robust"
    defaults: dict[str, Any] = {  # noqa: RUF012
        **UCE.defaults, "rounds": 3, "attacked": 16, "iterations": 20, "rate": 0.02, "weight": 1.0, "seed": 0,
        "picture_steps": 160, "picture_rank": 16, "picture_rate": 2e-3, "picture_preserve": 2.0, "batch": 4, "pool": 40,
    }  # fmt: skip

    def make(self, job: Job) -> Made:
        """Solves, attacks, and solves again with what the attack found."""
        s, rng = job.settings, random.Random(job.settings["seed"])
        found = {group[0]: job.features[group[0]].moments for group in job.groups}
        more: dict[str, list[solver.Moments]] = {group[0]: [] for group in job.groups}
        entries, facts = self._solved(job, found, more)
        distances = []
        for k in range(s["rounds"]):
            job.progress(k / s["rounds"], f"attack {k + 1} of {s['rounds']}")
            pairs = rng.sample(list(job.pairs), min(s["attacked"], len(job.pairs)))
            attack = adversarial_features(
                job,
                Patch(entries=entries, base=job.base, name="robust in the making"),
                pairs,
                s["iterations"],
                s["rate"],
            )
            distances.append(attack.distances)
            for first, features in attack.features.items():
                more[first].append(features.moments)
            entries, facts = self._solved(job, found, more)
        more_entries, unlearning = unlearned(job)
        report = {"groups": facts, "attack_distances": distances, **unlearning}
        return Made(entries=entries | more_entries, report=report)

    def _solved(
        self, job: Job, found: dict[str, solver.Moments], more: dict[str, list[solver.Moments]]
    ) -> tuple[dict[str, Entry], dict[str, dict[str, float]]]:
        entries: dict[str, Entry] = {}
        facts: dict[str, dict[str, float]] = {}
        for group in job.groups:
            first = group[0]
            merged = joined([found[first], *more[first]], job.settings["weight"])
            solution = self.ridge(job, merged)
            weights = torch.cat([job.weights[path] for path in group])
            wide = widened(merged, [derived(weights, solution.change_DD, 0.1)])
            made, facts[first] = lowrank_entries(job, group, self.ridge(job, wide), job.features[first])
            entries |= made
        return entries, facts


def joined(parts: list[solver.Moments], weight: float) -> solver.Moments:
    """Moments of given features and, each with a weight, of those that attacks found."""
    first, rest = parts[0], parts[1:]
    total = 1 + weight * len(rest)
    return solver.Moments(
        target_DD=(first.target_DD + weight * sum(p.target_DD for p in rest)) / total,
        cross_DD=(first.cross_DD + weight * sum(p.cross_DD for p in rest)) / total,
        gap=(first.gap + weight * sum(p.gap for p in rest)) / total,
        retained_DD=first.retained_DD,
    )
