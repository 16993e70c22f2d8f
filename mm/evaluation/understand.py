"""Evaluates reading: accuracy by kind of question, yes/no balance, and precision and recall of captions.

Design choices
- Scenes whose composition training never saw; every question that a scene can answer, in a random wording. Another
  namespace of seeds is for tuning.
- Existence is asked as in POPE (Li et al. 2023, arXiv 2305.10355): as many yes as no, half of the absent ones
  similar objects; the share of yes is reported, since always answering yes is half right.
- A description is read back into a scene graph: groups (count, colour, object), background, style and relation.
  Caption precision is the share of stated facts that are true, recall the share of the scene's facts that are stated.
- The ceiling is the grammar's own plain caption through the same reading.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from mm.core.statistics import share
from mm.evaluation.report import grid_png, write_report
from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.facts import Facts, read_caption
from mm.world.questions import KINDS, questions
from mm.world.render import render
from mm.world.scene import Group, Scene, group_relation, groups, sample_scene


class Reader(Protocol):
    """A model to evaluate."""

    def answer(self, pictures: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """One answer a pair."""
        ...

    def describe(self, pictures: Sequence[Any]) -> list[str]:
        """One description a picture."""
        ...


@dataclass(frozen=True, kw_only=True)
class UnderstandConfig:
    """`limit`: scenes (about seven questions each). `tuning`: seen compositions, for choosing settings."""

    seed: int = 0
    limit: int = 300
    tuning: bool = False
    batch_size: int = 16


def _same_colour(group: Group, stated: str | None) -> bool:
    return group.colour == stated or (stated is not None and v.counts_as(group.object, group.colour, stated))


def judge_facts(facts: Facts, scene: Scene) -> tuple[int, int, int, int]:
    """Stated facts that hold, stated facts, facts of the scene that were stated, facts of the scene."""
    open_groups = list(groups(scene))
    matched: dict[int, Group] = {}
    for i, stated in enumerate(facts.groups):
        for group in open_groups:
            if (stated.object, stated.count) == (group.object, group.count) and _same_colour(group, stated.colour):
                open_groups.remove(group)
                matched[i] = group
                break
    holds, said = len(matched), len(facts.groups)
    recalled, there = len(matched), len(groups(scene))
    right = facts.style == scene.style
    holds, said, recalled, there = holds + right, said + 1, recalled + right, there + 1
    if facts.background is not None:
        holds, said = holds + (facts.background == scene.background), said + 1
    if v.shows_background(scene.style):
        recalled, there = recalled + (facts.background == scene.background), there + 1
    if facts.relation is not None and len(facts.groups) >= 2:
        pair = (matched.get(0), matched.get(1))
        true = None not in pair and facts.relation in group_relation(scene, pair[0], pair[1])  # type: ignore[arg-type]
        holds, said = holds + true, said + 1
    return holds, said, recalled, there


def held_out_scenes(config: UnderstandConfig) -> list[Scene]:
    """The scenes that are asked about."""
    space = "tune" if config.tuning else "report"
    rng = random.Random(f"understand {space} {config.seed}")
    return [sample_scene(rng, held_out=not config.tuning) for _ in range(config.limit)]


def to_pictures(scenes: Sequence[Scene]) -> list[Image.Image]:
    """Scenes as PIL pictures."""
    parts = [render(scenes[i : i + 64]) for i in range(0, len(scenes), 64)]
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in torch.cat(parts)]


def _captions(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    sums = [
        sum(x) for x in zip(*(judge_facts(read_caption(t), s) for t, s in zip(texts, scenes, strict=True)), strict=True)
    ]
    return {"precision": round(sums[0] / max(sums[1], 1), 4), "recall": round(sums[2] / max(sums[3], 1), 4)}


def evaluate_understand(
    reader: Reader, config: UnderstandConfig, *, json_file: Path | None = None, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Asks, compares and reports; with `json_file`, writes it and a grid PNG beside it."""
    scenes = held_out_scenes(config)
    pictures = to_pictures(scenes)
    rng = random.Random(f"questions {config.seed}")
    asked = [(i, qa) for i, scene in enumerate(scenes) for qa in questions(scene, rng)]
    answers: list[str] = []
    for start in range(0, len(asked), config.batch_size):
        part = asked[start : start + config.batch_size]
        answers += reader.answer([pictures[i] for i, _ in part], [qa.question for _, qa in part])
    right: dict[str, list[bool]] = defaultdict(list)
    yes: list[bool] = []
    for (_, qa), answer in zip(asked, answers, strict=True):
        right[qa.kind].append(answer.strip(" .") == qa.answer)
        if qa.kind == "existence":
            yes.append(answer.strip(" .") == "yes")
    captions: list[str] = []
    for start in range(0, len(pictures), config.batch_size):
        captions += reader.describe(pictures[start : start + config.batch_size])
    tasks = {kind: share(right[kind]) for kind in KINDS if right[kind]}
    truth = [c.caption(s, rng, detail="plain") for s in scenes]
    report = {
        "overall": round(sum(t["score"] for t in tasks.values()) / max(len(tasks), 1), 4),
        "ceiling": 1.0,
        "n": len(asked),
        "tasks": tasks,
        "yes_share": round(sum(yes) / max(len(yes), 1), 4),
        "captions": _captions(captions, scenes),
        "ceiling_captions": _captions(truth, scenes),
        "settings": asdict(config) | (settings or {}),
    }
    if json_file is not None:
        shown = list(range(min(48, len(scenes))))
        marks: list[bool | None] = []
        for i in shown:
            holds, said, recalled, there = judge_facts(read_caption(captions[i]), scenes[i])
            marks.append(holds == said and recalled == there)
        drawn = render([scenes[i] for i in shown])
        write_report(json_file, report, grid_png(drawn, [captions[i] for i in shown], marks))
    return report
