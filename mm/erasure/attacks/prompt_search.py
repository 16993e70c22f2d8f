"""Discrete prompt search: words before the prompt that bring the concept back, as UnlearnDiffAtk (arXiv 2310.11868).

UnlearnDiffAtk optimizes five tokens for 40 iterations against the denoiser's loss. Here the loss is the distance at the
edited layers (`attacks.sites`), which needs no gradient: every iteration tries other words in one place and keeps the
best. That makes the attack run on any family.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from mm.adapters.patch import Patch
from mm.erasure.attacks.protocol import asked, result, shows
from mm.erasure.attacks.sites import Sites, words_of
from mm.erasure.measure import Measurer, seed_of
from mm.erasure.probes import Probe


class PromptSearch:
    """Greedy coordinate search over a prefix; each prompt is attacked alone, and the best prefixes are drawn."""

    name = "prompt-search"

    def __init__(
        self, most: int = 6, prefix: int = 5, iterations: int = 40, candidates: int = 24, drawn: int = 2
    ) -> None:
        self.most, self.prefix, self.iterations = most, prefix, iterations
        self.candidates, self.drawn = candidates, drawn

    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """The share of prompts where a found prefix brings the concept back."""
        chosen = asked(probes, self.most)
        sites = Sites(measurer.pipe, patch)
        words = words_of(measurer.pipe, ())
        found = [self.search(sites, p.prompt, words, seed_of(measurer.seed, p.prompt)) for p in chosen]
        texts = [text for each, _ in found for text in each]
        labels = measurer.labels(texts)
        before = measurer.labels([p.prompt for p in chosen], base=True)
        per = [labels[i * self.drawn : (i + 1) * self.drawn] for i in range(len(chosen))]
        hits = [any(shows(p, x) for x in each) for p, each in zip(chosen, per, strict=True)]
        plain = [shows(p, x) for p, x in zip(chosen, before, strict=True)]
        gain = [first - best for _, (first, best) in found]
        return result(
            hits, plain, iterations=self.iterations, prompts=texts[:6],
            distance_taken_off=round(sum(gain) / max(1, len(gain)), 4),
        )  # fmt: skip

    def search(
        self, sites: Sites, prompt: str, words: Sequence[str], seed: int
    ) -> tuple[list[str], tuple[float, float]]:
        """The best prompts, and the distance of the plain prompt and of the best one."""
        rng = random.Random(seed)
        wanted = sites.wanted(prompt)
        prefix = [rng.choice(words) for _ in range(self.prefix)]
        first = sites.distances([prompt], prompt, wanted)[0]
        best = [(sites.distances([_joined(prefix, prompt)], prompt, wanted)[0], _joined(prefix, prompt))]
        for step in range(self.iterations):
            place = step % self.prefix
            tries = []
            for word in rng.sample(list(words), min(self.candidates, len(words))):
                tries.append([*prefix[:place], word, *prefix[place + 1 :]])
            texts = [_joined(t, prompt) for t in tries]
            scores = sites.distances(texts, prompt, wanted)
            k = min(range(len(scores)), key=lambda i: scores[i])
            if scores[k] < best[0][0]:
                prefix = tries[k]
                best = [(scores[k], texts[k]), *best]
        made = [text for _, text in best[: self.drawn]]
        return [*made, *[made[-1]] * (self.drawn - len(made))], (first, best[0][0])


def _joined(prefix: Sequence[str], prompt: str) -> str:
    return f"{' '.join(prefix)} {prompt}"
