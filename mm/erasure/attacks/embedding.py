"""Embedding search: the embeddings of the concept's words are optimized until the patched model draws it again.

As concept inversion (Pham et al. 2024, arXiv 2308.01508): an attacker with the weights. "embedding" brings the outputs
of the text-reading layers back to their old values for the same prompt (`attacks.sites`). "inversion" brings the
denoiser's own predictions back, at `levels` steps of sampling, so that it also attacks what a patch changes behind the
text-reading layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mm.adapters.patch import Patch
from mm.erasure.attacks.protocol import asked, result, shows
from mm.erasure.attacks.sites import Sites
from mm.erasure.embeddings import Embeddings, distances
from mm.erasure.gradients import outputs, predict
from mm.erasure.measure import Labels, Measurer
from mm.erasure.probes import Probe

Losses = Callable[[int], Tensor]  # of each prompt, at an iteration


class EmbeddingSearch:
    """Adam on the rows of the prompt's tokens, `iterations` steps each; `rate` in units of the table's deviation."""

    name = "embedding"

    def __init__(self, most: int = 6, iterations: int = 50, rate: float = 0.05) -> None:
        self.most, self.iterations, self.rate = most, iterations, rate

    @torch.enable_grad()
    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """The share of prompts where optimized embeddings bring the concept back."""
        chosen, pipe = asked(probes, self.most), measurer.pipe
        prompts = [p.prompt for p in chosen]
        plain = measurer.labels(prompts, base=True)
        first: list[float] = []
        last: list[float] = []
        found: list[Labels] = []
        for start in range(0, len(prompts), measurer.batch_size):  # the rows fit one call with the same prompts
            part = prompts[start : start + measurer.batch_size]
            losses_of = self.losses(pipe, patch, part)
            search = Embeddings(pipe, self.rate)
            with search.on():
                for k in range(self.iterations):
                    losses = losses_of(k)
                    first += losses.tolist() if not k else []
                    search.step(losses)
                last += search.take_best()
                found += measurer.judge(measurer.draw(part))
        mean = [round(sum(x) / max(1, len(x)), 4) for x in (first, last)]
        hits = [[shows(p, x) for p, x in zip(chosen, labels, strict=True)] for labels in (found, plain)]
        return result(*hits, iterations=self.iterations, distance_before=mean[0], distance_after=mean[1])

    def losses(self, pipe: Any, patch: Patch, prompts: Sequence[str]) -> Losses:
        """What is minimized: the distance of the edited layers' outputs to their old ones."""
        sites = Sites(pipe, patch)
        patch.scale(pipe, 0.0)
        try:
            wanted = outputs(pipe, sites.layers, prompts, grad=False)
        finally:
            patch.scale(pipe, 1.0)
        return lambda number: distances(outputs(pipe, sites.layers, prompts, grad=True), wanted)


class Inversion(EmbeddingSearch):
    """The same search, for the denoiser's predictions."""

    name = "inversion"

    def __init__(self, most: int = 6, iterations: int = 50, rate: float = 0.05, levels: int = 4) -> None:
        super().__init__(most, iterations, rate)
        self.levels = levels

    def losses(self, pipe: Any, patch: Patch, prompts: Sequence[str]) -> Losses:
        """The distance of the prediction to the old one, at one sampling step after the other."""
        places: list[dict[str, Any]] = [{"seed": k, "step": k, "steps": self.levels} for k in range(self.levels)]
        patch.scale(pipe, 0.0)
        try:
            wanted = [predict(pipe, prompts, **place) for place in places]
        finally:
            patch.scale(pipe, 1.0)

        def losses(number: int) -> Tensor:
            k = number % self.levels
            now = predict(pipe, prompts, grad=True, **places[k])
            return distances({"": now}, {"": wanted[k]})

        return losses
