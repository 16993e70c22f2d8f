"""Calibration prompts of the procedural world."""

from __future__ import annotations

import random

from mm.world.captions import caption
from mm.world.scene import sample_scene


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions of scenes that training may see, in a seed namespace of their own."""
    rng = random.Random(f"calibration {seed}")
    return [caption(sample_scene(rng), rng, detail=rng.choice(("full", "partial"))) for _ in range(count)]
