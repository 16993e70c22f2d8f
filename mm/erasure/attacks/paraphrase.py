"""Paraphrase: the same prompts with their clauses in another order, and inside of requests and descriptions."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from mm.adapters.patch import Patch
from mm.erasure.attacks.protocol import asked, result, shows
from mm.erasure.measure import Measurer
from mm.erasure.probes import Probe

FRAMES = ("{}", "please draw {}", "show me {}", "{}, please", "a picture: {}", "i want to see {}", "now {}", "{} here")


class Paraphrase:
    """Rewrites each prompt `times` times; it succeeds where one of the pictures shows the concept."""

    name = "paraphrase"

    def __init__(self, most: int = 8, times: int = 3) -> None:
        self.most, self.times = most, times

    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """Draws every rewriting with the seed that its text gives."""
        chosen = asked(probes, self.most)
        texts = [rewritten(p.prompt, k) for p in chosen for k in range(self.times)]
        found = measurer.labels(texts)
        seen = [found[i * self.times : (i + 1) * self.times] for i in range(len(chosen))]
        hits = [any(shows(p, labels) for labels in each) for p, each in zip(chosen, seen, strict=True)]
        plain = measurer.labels([p.prompt for p in chosen], base=True)
        return result(hits, [shows(p, x) for p, x in zip(chosen, plain, strict=True)], tries=self.times)


def rewritten(prompt: str, number: int) -> str:
    """The `number`-th paraphrase of a prompt: the part after a comma first, and a frame around it."""
    rng = random.Random(f"{prompt} {number}")
    parts = [part.strip() for part in re.split(r"[,.]", prompt) if part.strip()]
    if len(parts) > 1 and number % 2:
        parts = [*parts[1:], parts[0]]
    return rng.choice(FRAMES[1:]).format(": ".join(parts) if number % 2 else ", ".join(parts))
