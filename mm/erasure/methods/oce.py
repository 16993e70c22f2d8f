"""OCE (ICML 2026): an orthogonal map of a layer's outputs, W' = R W, by orthogonal Procrustes."""

from __future__ import annotations

from typing import Any

from mm.adapters.entry import Entry
from mm.core.nouns import counted
from mm.erasure import solver
from mm.erasure.methods.protocol import Job, Made


class OCE:
    """A rotation for each text-reading layer. On a 4-bit layer it must be truncated to a branch."""

    name = "oce"
    defaults: dict[str, Any] = {"preserve": 1.0, "ridge": 1e-2, "amplify": 1.0}  # noqa: RUF012

    def make(self, job: Job) -> Made:
        """One rotation a layer."""
        entries: dict[str, Entry] = {}
        facts: dict[str, dict[str, float]] = {}
        s = job.settings
        for k, group in enumerate(job.groups):
            features = job.features[group[0]]
            for path in group:
                weight = job.weights[path]
                turned = solver.rotation(
                    weight,
                    features,
                    strength=s["amplify"] * job.strength * job.targets,
                    preserve=s["preserve"],
                    ridge=s["ridge"],
                )
                entries[path] = Entry(kind="rotation", tensors={"rotation": turned.float().contiguous()})
                moved = (turned @ weight - weight).norm() / weight.norm()
                facts[path] = {
                    "moved": float(moved),
                    "orthogonality": float((turned @ turned.T).sub_(_eye(turned)).norm()),
                }
            job.progress((k + 1) / len(job.groups), f"{k + 1} of {counted(len(job.groups), 'group')} of layers")
        return Made(entries=entries, report={"layers": facts})


def _eye(like: Any) -> Any:
    return like.new_zeros(like.shape).fill_diagonal_(1.0)
