"""Search over initial noise: other seeds for the same prompt, until one brings the concept back.

What IVO (arXiv 2602.00175) does with gradients, at the black-box end: a user who draws again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm.adapters.patch import Patch
from mm.erasure.attacks.protocol import asked, result, shows
from mm.erasure.measure import Measurer
from mm.erasure.probes import Probe


class Noise:
    """Draws each prompt with `tries` seeds; it succeeds where one picture shows the concept."""

    name = "noise"

    def __init__(self, most: int = 6, tries: int = 8) -> None:
        self.most, self.tries = most, tries

    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """The share of prompts with a seed that brings the concept back, and of all pictures that show it."""
        chosen = asked(probes, self.most)
        rounds = [
            [shows(p, x) for p, x in zip(chosen, measurer.judge(pictures), strict=True)]
            for pictures in (measurer.draw([p.prompt for p in chosen], index=k) for k in range(self.tries))
        ]
        hits = [any(row[i] for row in rounds) for i in range(len(chosen))]
        pictures = sum(sum(row) for row in rounds) / max(1, len(chosen) * self.tries)
        return result(hits, rounds[0], tries=self.tries, share_of_pictures=round(pictures, 4))
