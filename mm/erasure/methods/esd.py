"""ESD (Gandikota et al. 2023, arXiv 2303.07345): the prediction for the target is trained away from the target.

Loss: |v(c) - [v0(a) - eta (v0(c) - v0(a))]|^2, with the frozen model's predictions v0 for the target's prompt c and the
anchor's prompt a in place of the empty one; and |v(r) - v0(r)|^2 for retained prompts. Trained are low-rank terms at
the text-reading layers (ESD-x).
"""

from __future__ import annotations

import random
from typing import Any

import torch

from mm.erasure.gradients import LowRank, descend, gradients, predict
from mm.erasure.methods.protocol import Job, Made


class ESD:
    """Low-rank terms, trained for `steps` steps on predictions from noise."""

    name = "esd"
    defaults: dict[str, Any] = {  # noqa: RUF012
        "steps": 150, "rank": 16, "rate": 2e-3, "eta": 0.3, "preserve": 1.0, "batch": 4, "seed": 0,
    }  # fmt: skip

    @torch.enable_grad()
    def make(self, job: Job) -> Made:
        """Trains, and gives the terms as entries."""
        s = job.settings
        terms = LowRank(job.layers, s["rank"], s["seed"])
        optimizer = torch.optim.Adam(terms.parameters, lr=s["rate"])
        rng, losses = random.Random(s["seed"]), []
        for k in range(s["steps"]):
            loss = self.loss(job, terms, rng, k)
            descend(optimizer, terms.parameters, gradients(loss, terms))
            losses.append(float(loss.detach()))
            job.progress((k + 1) / s["steps"], f"step {k + 1} of {s['steps']}, loss {losses[-1]:.4f}")
        last = losses[-10:]
        report = {"steps": s["steps"], "first_loss": losses[0], "last_loss": sum(last) / len(last)}
        return Made(entries=terms.entries(job.strength), report=report)

    def loss(self, job: Job, terms: Any, rng: random.Random, number: int) -> torch.Tensor:
        """The loss of one step."""
        s, (pairs, kept) = job.settings, sampled(job, rng)
        prompts = [*[t for t, _ in pairs], *kept]
        with torch.no_grad():
            place: dict[str, Any] = {"seed": number, "step": number % 4, "steps": 4}
            old = predict(job.pipe, prompts, **place)
            anchor = predict(job.pipe, [*[a for _, a in pairs], *kept], **place)
        with terms.on():
            new = predict(job.pipe, prompts, grad=True, **place)
        n = len(pairs)
        wanted = anchor[:n] - s["eta"] * (old[:n] - anchor[:n])
        return (new[:n] - wanted).square().mean() + s["preserve"] * (new[n:] - old[n:]).square().mean()


def sampled(job: Job, rng: random.Random) -> tuple[list[tuple[str, str]], list[str]]:
    """A batch of pairs, and as many retained prompts."""
    size = job.settings["batch"]
    pairs = rng.sample(list(job.pairs), min(size, len(job.pairs)))
    return pairs, rng.sample(list(job.retained), min(size, len(job.retained)))
