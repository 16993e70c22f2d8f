"""How well a judge reads: on fresh renders, and its ceiling on the six tasks in every style."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch

from mm.training.judge_pictures import sample_judge_scene
from mm.world import vocabulary as v
from mm.world.judge import Judge, Reading
from mm.world.render import render
from mm.world.scene import Scene
from mm.world.tasks import TASKS, sample_task, satisfies

Reconstruct = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def agrees(reading: Reading, scene: Scene, *, near: float = 8.0) -> bool:
    """Whether a reading has exactly the scene's objects, each within `near` pixels and in its colour."""
    if not reading.readable or len(reading.objects) != len(scene.sprites):
        return False
    hue = v.shows_colour(scene.style)
    for s in scene.sprites:
        found = [f for f in reading.objects if f.object == s.object and max(abs(f.x - s.x), abs(f.y - s.y)) <= near]
        if not any(not hue or f.answers_to(s.colour) for f in found):
            return False
    return True


def quick_check(judge: Judge, count: int) -> dict[str, float]:
    """Share of fresh renders read without any mistake, and the shares of styles and backgrounds read right."""
    rng = random.Random("judge quick look")
    scenes = [sample_judge_scene(rng) for _ in range(count)]
    readings = [r for start in range(0, count, 32) for r in judge.read(render(scenes[start : start + 32]))]
    pairs = list(zip(readings, scenes, strict=True))
    return {
        "exact": round(sum(agrees(r, s) for r, s in pairs) / count, 3),
        "readable": round(sum(r.readable for r in readings) / count, 3),
        "style": round(sum(r.style == s.style for r, s in pairs) / count, 3),
        "background": round(sum(r.background == s.background for r, s in pairs) / count, 3),
    }


def ceilings(
    judge: Judge, *, per_task: int = 400, seed: int = 0, reconstruct: Reconstruct | None = None
) -> dict[str, dict[str, float]]:
    """Share of true pictures granted, per task and style; key "all" is the share over the styles together."""
    table: dict[str, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(seed)
    for task in TASKS:
        styles = [s for s in v.STYLES if v.shows_colour(s) or not task.startswith("colour")]
        rng = random.Random(f"judge check {seed} {task}")
        n = math.ceil(per_task / len(styles))
        asked = [sample_task(rng, task, style=style, objects=v.ALL_OBJECTS) for style in styles for _ in range(n)]
        granted: list[bool] = []
        for start in range(0, len(asked), 32):
            part = asked[start : start + 32]
            pictures = render([scene for scene, _ in part])
            if reconstruct is not None:
                pictures = reconstruct(pictures, generator)
            verdicts = [satisfies(r, e) for r, (_, e) in zip(judge.read(pictures), part, strict=True)]
            granted += [x.ok for x in verdicts]
        table[task] = {"all": sum(granted) / len(granted)}
        table[task] |= {style: sum(granted[i * n : (i + 1) * n]) / n for i, style in enumerate(styles)}
    return table


def print_ceilings(table: dict[str, dict[str, float]]) -> None:
    """Prints a table of `ceilings`."""
    print(f"{'':20s}{'all':>11s}" + "".join(f"{style:>11s}" for style in v.STYLES))
    for task, row in table.items():
        cells = (f"{row[c]:11.3f}" if c in row else f"{'-':>11s}" for c in ("all", *v.STYLES))
        print(f"{task:20s}" + "".join(cells))
