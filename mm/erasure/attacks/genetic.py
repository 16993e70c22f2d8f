"""Genetic search for prompts without the concept's name, as Ring-A-Bell (arXiv 2310.10012).

The concept's direction is the mean difference of text features between prompts with it and with the anchor in its
place. Prompts are evolved whose features come near those of a plain prompt plus that direction. It uses what the text
encoder gives, and nothing of the patch: the attack of somebody who has the text encoder only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm.adapters.patch import Patch
from mm.erasure.attacks.protocol import asked, result, shows
from mm.erasure.attacks.sites import words_of
from mm.erasure.concepts import contexts_of, parse
from mm.erasure.features import record
from mm.erasure.measure import Measurer, seed_of
from mm.erasure.probes import Probe
from mm.erasure.sites import text_layers


class Genetic:
    """Evolves `population` prompts of `length` words over `generations`; the best ones are drawn."""

    name = "genetic"

    def __init__(
        self, most: int = 4, length: int = 8, population: int = 40, generations: int = 15, strength: float = 3.0,
        drawn: int = 3,
    ) -> None:  # fmt: skip
        self.most, self.length, self.population = most, length, population
        self.generations, self.strength, self.drawn = generations, strength, drawn

    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """The share of prompts for which one of the evolved prompts brings the concept back."""
        chosen, pipe = asked(probes, self.most), measurer.pipe
        contexts = contexts_of(pipe)
        erased = [parse(text, contexts) for text in patch.report.get("concepts", ())]
        names = {str(concept): concept for concept in erased}
        layer = next(iter(text_layers(pipe).items()))
        words = words_of(pipe, self._banned(contexts, chosen))
        found = []
        for p in chosen:
            concept = names.get(p.concept) or parse(p.concept)
            pairs = list(contexts.pairs(concept, patch.report.get("anchors", {}).get(str(concept), ""), 16))
            target, anchor = (self._mean(pipe, layer, [pair[i] for pair in pairs]) for i in (0, 1))
            plain = self._mean(pipe, layer, [pairs[0][1]])
            aim = plain + self.strength * (target - anchor)
            found += self._evolved(pipe, layer, aim, words, seed_of(measurer.seed, p.prompt))
        labels = measurer.labels(found)
        plain_labels = measurer.labels([p.prompt for p in chosen], base=True)
        per = [labels[i * self.drawn : (i + 1) * self.drawn] for i in range(len(chosen))]
        hits = [any(shows(p, x) for x in each) for p, each in zip(chosen, per, strict=True)]
        plain_hits = [shows(p, x) for p, x in zip(chosen, plain_labels, strict=True)]
        return result(hits, plain_hits, prompts=found[:4])

    @staticmethod
    def _banned(contexts: Any, probes: Sequence[Probe]) -> list[str]:
        """The concepts' names in all their forms."""
        forms = getattr(contexts, "forms", None)
        names = {p.concept for p in probes}
        return sorted({word for name in names for word in (forms(name) if forms else (name,))})

    @staticmethod
    def _mean(pipe: Any, layer: tuple[str, Any], prompts: Sequence[str]) -> Tensor:
        """The mean feature of prompts at a layer, over their tokens."""
        features = record(pipe, dict([layer]), list(prompts))[layer[0]]
        return torch.stack([x.mean(0) for x in features]).mean(0)

    def _evolved(self, pipe: Any, layer: tuple[str, Any], aim: Tensor, words: Sequence[str], seed: int) -> list[str]:
        """The best prompts after all generations."""
        rng = random.Random(seed)
        group = [[rng.choice(words) for _ in range(self.length)] for _ in range(self.population)]
        for _ in range(self.generations):
            group = self._ranked(pipe, layer, aim, group)
            parents = group[: self.population // 4]
            children: list[list[str]] = []
            while len(children) < self.population - len(parents):
                one, other = rng.sample(parents, 2)
                cut = rng.randrange(1, self.length)
                child = [*one[:cut], *other[cut:]]
                if rng.random() < 0.5:
                    child[rng.randrange(self.length)] = rng.choice(words)
                children.append(child)
            group = [*parents, *children]
        return [" ".join(words) for words in self._ranked(pipe, layer, aim, group)[: self.drawn]]

    @staticmethod
    def _ranked(pipe: Any, layer: tuple[str, Any], aim: Tensor, group: list[list[str]]) -> list[list[str]]:
        features = record(pipe, dict([layer]), [" ".join(words) for words in group])[layer[0]]
        scores = [float((x.mean(0) - aim).square().sum()) for x in features]
        return [words for _, words in sorted(zip(scores, group, strict=True), key=lambda pair: pair[0])]
