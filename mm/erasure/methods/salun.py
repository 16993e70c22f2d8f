"""SalUn (Fan et al., ICLR 2024, arXiv 2310.12508): only the weights with the largest gradients forget.

The target is relabelled: its prompts are trained towards what the frozen model predicts for the anchor's. A mask keeps
the half of the weights whose gradients of that loss are smallest at their old values. Retained prompts keep their
predictions.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from mm.erasure.gradients import Dense, descend, gradients
from mm.erasure.methods.esd import ESD
from mm.erasure.methods.protocol import Job, Made


class SalUn(ESD):
    """Dense changes of the salient weights of the text-reading layers."""

    name = "salun"
    defaults: dict[str, Any] = {  # noqa: RUF012
        "steps": 150, "share": 0.5, "rate": 1e-3, "eta": 0.0, "preserve": 1.0, "batch": 4, "seed": 0,
    }  # fmt: skip

    @torch.enable_grad()
    def make(self, job: Job) -> Made:
        """Finds the mask, trains, and gives dense entries."""
        s = job.settings
        terms, rng = Dense(job.layers), random.Random(s["seed"])
        first = gradients(self.loss(job, terms, rng, 0), terms)
        terms.keep_largest(first, s["share"])
        optimizer = torch.optim.Adam(terms.parameters, lr=s["rate"])
        losses = []
        for k in range(s["steps"]):
            loss = self.loss(job, terms, rng, k)
            grads = gradients(loss, terms)
            descend(optimizer, terms.parameters, terms.masked(grads))
            losses.append(float(loss.detach()))
            job.progress((k + 1) / s["steps"], f"step {k + 1} of {s['steps']}, loss {losses[-1]:.4f}")
        last = losses[-10:]
        report = {"steps": s["steps"], "first_loss": losses[0], "last_loss": sum(last) / len(last)}
        return Made(entries=terms.entries(job.strength), report=report)
