"""HiRM (ICLR 2026): the first block of the text encoder is trained so that the target reads as the anchor.

The target of the training are the features that the denoiser's text-reading layers read: for the target's prompts
those of the anchor's prompts, token by token; for retained prompts their own. Only low-rank terms of the first block's
linear layers are trained, in every text encoder of the pipeline. In mm-tiny that block also reads questions, so reading
forgets the concept as well.
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from torch import Tensor, nn

from mm.erasure.alignment import matched, moved
from mm.erasure.gradients import LowRank, descend, gradients, outputs
from mm.erasure.methods.esd import sampled
from mm.erasure.methods.protocol import Job, Made, lacking
from mm.families.registry import is_text_encoder
from mm.layers.surgery import linears, roots_of

_BLOCK = re.compile(r"(.*?(?:^|\.)(?:layers|block|blocks|h|text_layers))\.(\d+)\.(.+)")


class HiRM:
    """Low-rank terms in the first block of every text encoder."""

    name = "hirm"
    defaults: dict[str, Any] = {  # noqa: RUF012
        "steps": 80, "rank": 16, "rate": 2e-3, "preserve": 1.0, "batch": 8, "seed": 0,
    }  # fmt: skip

    @torch.enable_grad()
    def make(self, job: Job) -> Made:
        """Trains, and gives the terms as entries."""
        s = job.settings
        terms = LowRank(first_blocks(job.pipe), s["rank"], s["seed"])
        optimizer = torch.optim.Adam(terms.parameters, lr=s["rate"])
        rng, losses = random.Random(s["seed"]), []
        for k in range(s["steps"]):
            loss = self._loss(job, terms, rng)
            descend(optimizer, terms.parameters, gradients(loss, terms))
            losses.append(float(loss.detach()))
            job.progress((k + 1) / s["steps"], f"step {k + 1} of {s['steps']}, loss {losses[-1]:.4f}")
        last = losses[-10:]
        report = {"steps": s["steps"], "first_loss": losses[0], "last_loss": sum(last) / len(last)}
        return Made(entries=terms.entries(job.strength), report=report)

    def _loss(self, job: Job, terms: LowRank, rng: random.Random) -> Tensor:
        pairs, kept = sampled(job, rng)
        layers = {group[0]: job.layers[group[0]] for group in job.groups}
        prompts = [*[t for t, _ in pairs], *kept]
        old = outputs(job.pipe, layers, [*prompts, *[a for _, a in pairs]], grad=False, reads=True)
        with terms.on():
            new = outputs(job.pipe, layers, [*prompts, *[a for _, a in pairs]], grad=True, reads=True)
        n, m = len(pairs), len(prompts)
        total = []
        for path in layers:
            size = old[path].float().square().mean().clamp_min(1e-30)
            for i, (target, anchor) in enumerate(pairs):
                here, there = matched(job.pipe, target, anchor, old[path].shape[1])
                here, there = (moved(x, job.template, old[path].shape[1]) for x in (here, there))
                gap = new[path][i][here] - old[path][m + i][there]
                total.append(gap.float().square().mean() / size / n)
            still = (new[path][n:m] - old[path][n:m]).float().square().mean() / size
            total.append(job.settings["preserve"] * still)
        return torch.stack(total).sum() / len(layers)


def first_blocks(pipe: Any) -> dict[str, nn.Linear]:
    """The linear layers of the first block of each text encoder, or of mm-tiny's text stream, by path.

    Raises:
        UserError: where there is none.
    """
    found: dict[str, nn.Linear] = {}
    for name, root in roots_of(pipe).items():
        for path, layer in linears(root):
            match = _BLOCK.match(path)
            if match is None or match[2] != "0":
                continue
            own = match[1] == "text_layers" and not match[3].endswith("_pic")
            if own or (is_text_encoder(root) and "vis" not in match[1]):
                found[f"{name}.{path}".strip(".")] = layer
    if not found:
        raise lacking(pipe, "hirm", "text encoder with blocks")
    return found
