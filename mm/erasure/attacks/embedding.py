"""Embedding search: the embeddings of the concept's words are optimized until the patched layers draw it again.

As concept inversion (Pham et al. 2024, arXiv 2308.01508) does with the denoiser's loss: an attacker with the weights.
Here the loss is the distance of the patched layers' outputs to their old outputs for the same prompt (`attacks.sites`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm.adapters.patch import Patch
from mm.erasure.adversary import Embeddings, distance
from mm.erasure.attacks.protocol import asked, result, shows
from mm.erasure.attacks.sites import Sites
from mm.erasure.gradients import outputs
from mm.erasure.measure import Measurer
from mm.erasure.probes import Probe


class EmbeddingSearch:
    """Adam on the rows of the prompt's tokens, `iterations` steps each; `rate` in units of the table's deviation."""

    name = "embedding"

    def __init__(self, most: int = 6, iterations: int = 50, rate: float = 0.05) -> None:
        self.most, self.iterations, self.rate = most, iterations, rate

    @torch.enable_grad()
    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """The share of prompts where optimized embeddings bring the concept back."""
        chosen, pipe = asked(probes, self.most), measurer.pipe
        plain = measurer.labels([p.prompt for p in chosen])
        hits, first, last = [], [], []
        for p in chosen:
            sites = Sites(pipe, patch)
            patch.scale(pipe, 0.0)
            try:
                wanted = outputs(pipe, sites.layers, [p.prompt], grad=False)
            finally:
                patch.scale(pipe, 1.0)
            search = Embeddings(pipe, self.rate)
            with search.on():
                losses = []
                for _ in range(self.iterations):
                    loss = distance(outputs(pipe, sites.layers, [p.prompt], grad=True), wanted)
                    losses.append(float(loss.detach()))
                    search.step(loss)
                first.append(losses[0])
                last.append(search.take_best())
                hits.append(shows(p, measurer.labels([p.prompt])[0]))
        mean = [round(sum(x) / max(1, len(x)), 4) for x in (first, last)]
        return result(
            hits, [shows(p, x) for p, x in zip(chosen, plain, strict=True)], iterations=self.iterations,
            distance_before=mean[0], distance_after=mean[1],
        )  # fmt: skip
