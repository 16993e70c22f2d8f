"""How well a model edits: whether the change was made, and whether the rest stayed.

Design choices
- Edits of scenes whose compositions training never saw, of every kind. The judge reads the edited picture; the
  renderer knows source and target.
- Success: what the instruction asked for is there (the new colour, object, place, background or style; what was to go
  is gone). Preservation: the share of everything else that is still there, sprites within a quarter of their size of
  their place, background and style. The score is the root of their product, as in GEdit (sqrt(SC * PQ)).
- The ceiling is the renderer's own target through the same reading.

This module does not know pipelines: anything that has `edit` can be measured.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mm.evaluation.report import save_grid, share
from mm.evaluation.understand import to_pictures
from mm.files import write_json
from mm.world import vocabulary as v
from mm.world.edits import KINDS, Edit, sample_edit
from mm.world.judge import Found, Judge, Reading
from mm.world.render import render
from mm.world.scene import Sprite


class Editor(Protocol):
    """What is measured."""

    def edit(self, pictures: Sequence[Any], instructions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One edited picture each, from its own seed."""
        ...


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """`limit`: edits of each kind. `tuning`: seen compositions, for choosing guidance and the like."""

    seed: int = 0
    limit: int = 40
    tuning: bool = False
    batch_size: int = 8


def held_out_edits(config: EditConfig) -> list[Edit]:
    """The edits that are asked for."""
    space = "tune" if config.tuning else "report"
    rng = random.Random(f"edit {space} {config.seed}")
    return [sample_edit(rng, kind, held_out=not config.tuning) for kind in KINDS for _ in range(config.limit)]


def _there(found: Sequence[Found], sprite: Sprite, reach: float = 0.25) -> bool:
    """Whether a sprite is seen at its place, in its colour."""
    for f in found:
        near = max(abs(f.x - sprite.x), abs(f.y - sprite.y)) <= max(8.0, reach * sprite.size)
        tinted = not f.colours or f.answers_to(sprite.colour)  # a style without hue shows none
        if f.object == sprite.object and near and tinted:
            return True
    return False


def judge_edit(edit: Edit, reading: Reading) -> tuple[bool, float]:
    """Success, and the share of the rest that stayed."""
    if not reading.readable:
        return False, 0.0
    source, target = edit.source, edit.target
    changed = [s for s in target.sprites if s not in source.sprites]
    gone = [s for s in source.sprites if s not in target.sprites]
    facts = [_there(reading.objects, s) for s in target.sprites if s in source.sprites]
    if edit.kind == "restyle":  # a style without hue drops tints: a sprite stayed as it was or without
        both = zip(source.sprites, target.sprites, strict=True)
        facts = [any(_there(reading.objects, s) for s in pair) for pair in both]
    if edit.kind == "restyle":
        success = reading.style == target.style
    elif edit.kind == "background":
        success = reading.background == target.background
    elif edit.kind == "remove":
        names = {s.object for s in gone}
        success = not any(f.object in names for f in reading.objects)
    else:
        success = all(_there(reading.objects, s, 0.5) for s in changed)
        success = success and not any(_there(reading.objects, s) for s in gone if edit.kind in ("replace", "move"))
    if edit.kind != "restyle":
        facts.append(reading.style == target.style)
    if edit.kind != "background" and v.shows_background(target.style) and v.shows_background(source.style):
        facts.append(reading.background == target.background)
    return success, sum(facts) / len(facts) if facts else 1.0


def _score(edits: Sequence[Edit], readings: Sequence[Reading]) -> tuple[dict[str, Any], list[bool]]:
    verdicts = [judge_edit(e, r) for e, r in zip(edits, readings, strict=True)]
    tasks: dict[str, Any] = {}
    for kind in KINDS:
        mine = [x for e, x in zip(edits, verdicts, strict=True) if e.kind == kind]
        if mine:
            success, kept = share([s for s, _ in mine]), sum(p for _, p in mine) / len(mine)
            score = round(sqrt(success["score"] * kept), 4)
            tasks[kind] = success | {"score": score, "success": success["score"], "preservation": round(kept, 4)}
    return tasks, [success for success, _ in verdicts]


def _mean(tasks: dict[str, Any]) -> float:
    return round(sum(t["score"] for t in tasks.values()) / max(len(tasks), 1), 4)


def evaluate_edit(
    editor: Editor,
    judge: Judge,
    config: EditConfig,
    *,
    json_file: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Edits, judges and reports; with `json_file`, writes it and a grid PNG (source, edited) beside it."""
    edits = held_out_edits(config)
    sources = to_pictures([e.source for e in edits])
    made: list[torch.Tensor] = []
    for start in range(0, len(edits), config.batch_size):
        stop = min(start + config.batch_size, len(edits))
        seeds = [config.seed * 100_003 + i for i in range(start, stop)]
        out = editor.edit(sources[start:stop], [e.instruction for e in edits[start:stop]], seeds)
        made += [pil_to_tensor(picture) for picture in out]
    pictures = torch.stack(made)
    tasks, successes = _score(edits, judge.read(pictures))
    targets = torch.cat([render([e.target for e in edits[i : i + 64]]) for i in range(0, len(edits), 64)])
    ceilings, _ = _score(edits, judge.read(targets))
    report = {
        "overall": _mean(tasks),
        "ceiling": _mean(ceilings),
        "n": len(edits),
        "tasks": tasks,
        "ceiling_tasks": {kind: task["score"] for kind, task in ceilings.items()},
        "settings": asdict(config) | (settings or {}),
    }
    if json_file is not None:
        write_json(json_file, report)
        shown = torch.linspace(0, len(edits) - 1, min(len(edits), 28)).long().tolist()
        pairs = torch.stack([t for i in shown for t in (pil_to_tensor(sources[i]), pictures[i])])
        labels = [text for i in shown for text in ("", edits[i].instruction)]
        marks: list[bool | None] = [m for i in shown for m in (None, successes[i])]
        save_grid(json_file.with_suffix(".png"), pairs, labels, marks)
    return report
