"""Unlearning on the picture side: what the denoiser's own layers do with a concept's text, whoever brings it in.

An edit of the text-reading layers can be undone from outside: by embeddings, other prompts or pictures for which these
layers give their old outputs again. So low-rank terms of the layers that read the picture are trained as well, with the
text side as it was: for the target's prompts towards the frozen model's predictions for the anchor's (the relabelling
of SalUn, Fan et al. 2024, arXiv 2310.12508), for the anchor's and other prompts towards its own. Text features that the
patch's closed form has not erased then draw the anchor.

The frozen predictions are made once for a pool of batches, which training passes through several times.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.erasure.gradients import LowRank, descend, gradients, predict
from mm.erasure.methods.protocol import Job
from mm.families import find_sites
from mm.families.registry import is_denoiser
from mm.layers.surgery import roots_of, submodule

ROLES = ("attn_q", "attn_k", "attn_v", "attn_out", "ff_up", "ff_down")
STEPS = 4  # of the sampling in which predictions are taken


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Prompts, where their predictions are taken, and what these should be; the first `targets` of them are targets.

    `gap` is the loss before training.
    """

    prompts: list[str]
    place: dict[str, Any]
    wanted: Tensor
    targets: int
    gap: float


def picture_layers(pipe: Any) -> dict[str, nn.Linear]:
    """The attention and feed-forward layers of the denoisers that read the picture, by path."""
    found: dict[str, nn.Linear] = {}
    for name, root in roots_of(pipe).items():
        if is_denoiser(root):
            for site in find_sites(root):
                layer = submodule(root, site.path)
                if site.reads == "picture" and site.role in ROLES and isinstance(layer, nn.Linear):
                    found[f"{name}.{site.path}".strip(".")] = layer
    return found


@torch.enable_grad()
def unlearned(job: Job) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Entries that make the picture side draw the anchor for the target's text, and facts for the report.

    Settings of the job: "picture_steps" of Adam, "picture_rank", "picture_rate", "picture_preserve" (weight of what
    must stay), "batch" (pairs, and as many other prompts), "pool" (batches) and "seed".
    """
    s, layers = job.settings, picture_layers(job.pipe)
    if not layers or not s["picture_steps"]:
        return {}, {}
    rng = random.Random(s["seed"])
    pool = [_batch(job, rng, k) for k in range(min(s["pool"], s["picture_steps"]))]
    terms = LowRank(layers, s["picture_rank"], s["seed"])
    optimizer = torch.optim.Adam(terms.parameters, lr=s["picture_rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s["picture_steps"])
    losses = []
    for k in range(s["picture_steps"]):
        batch = pool[k % len(pool)]
        with terms.on():
            new = predict(job.pipe, batch.prompts, grad=True, **batch.place)
        gaps = (new - batch.wanted).square().flatten(1).mean(1)
        loss = gaps[: batch.targets].mean() + s["picture_preserve"] * gaps[batch.targets :].mean()
        descend(optimizer, terms.parameters, gradients(loss, terms))
        schedule.step()
        losses.append(float(loss.detach()))
        job.progress(k / s["picture_steps"], f"unlearning, step {k + 1} of {s['picture_steps']}, loss {losses[-1]:.4f}")
    last = losses[-len(pool) :]  # the last time through the pool
    facts = {"first_loss": mean(b.gap for b in pool), "last_loss": mean(last)}
    # what did not run, as a head for another mode, was not trained
    made = {path: entry for path, entry in terms.entries(job.strength).items() if entry.tensors["up"].any()}
    return made, {"unlearning": facts | {"layers": len(made)}}


@torch.no_grad()
def _batch(job: Job, rng: random.Random, number: int) -> _Batch:
    """Targets with what the frozen model predicts for their anchors, then anchors and other prompts with their own."""
    size = job.settings["batch"]
    pairs = rng.sample(list(job.pairs), min(size, len(job.pairs)))
    kept = rng.sample(list(job.retained), min(size, len(job.retained)))
    place: dict[str, Any] = {"seed": number, "step": number % STEPS, "steps": STEPS}
    old = predict(job.pipe, [*[a for _, a in pairs], *kept], **place)
    n, half = len(pairs), len(pairs) // 2
    # the noise of prompt k of a call depends on k, so that anchors are predicted again behind the targets
    prompts = [*[t for t, _ in pairs], *kept, *[a for _, a in pairs[:half]]]
    own = predict(job.pipe, prompts, **place)
    gap = float((own[:n] - old[:n]).square().mean())
    return _Batch(prompts=prompts, place=place, wanted=torch.cat([old[:n], own[n:]]), targets=n, gap=gap)
