"""How well a model edits: whether the change was made, and whether the rest stayed.

Design choices
- Edits of scenes whose compositions training never saw, of every kind. The judge reads the edited picture; the
  renderer knows source and target.
- Success: what the instruction asked for is there (the new colour, object, place, background or style; what was to go
  is gone). It asks for no more than was said: what is added may stand anywhere, or anywhere on the side of the object
  that was named, and what is moved anywhere in the half that was named.
- Preservation: the share of everything else that is still there, sprites within a quarter of their size of their place,
  background and style. The score is the root of the product of the two, as in GEdit (sqrt(SC * PQ)).
- The ceiling is the renderer's own target through the same reading.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mm.core.statistics import share
from mm.evaluation.report import grid_png, write_report
from mm.evaluation.understand import to_pictures
from mm.world import vocabulary as v
from mm.world.edits import KINDS, Edit, sample_edit
from mm.world.judge import Found, Judge, Reading
from mm.world.render import render
from mm.world.scene import Sprite, relation_of


class Editor(Protocol):
    """A model to evaluate."""

    def edit(
        self, pictures: Sequence[Any], instructions: Sequence[str], seeds: Sequence[int], *, best_of: int = 1
    ) -> list[Image.Image]:
        """One edited picture each, from its own seed; `best_of` as in `mm.pipelines.best_of`."""
        ...


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """`limit`: edits of each kind. `tuning`: seen compositions, for choosing guidance and the like.

    `best_of`: the most times that a picture is changed, by the model's own reading (`mm.pipelines.best_of`).
    """

    seed: int = 0
    limit: int = 40
    tuning: bool = False
    batch_size: int = 8
    best_of: int = 1


def held_out_edits(config: EditConfig) -> list[Edit]:
    """The edits that are asked for."""
    space = "tune" if config.tuning else "report"
    rng = random.Random(f"edit {space} {config.seed}")
    return [sample_edit(rng, kind, held_out=not config.tuning) for kind in KINDS for _ in range(config.limit)]


def _there(found: Sequence[Found], sprite: Sprite, reach: float = 0.25) -> bool:
    """Whether a sprite is found at its place, in its colour."""
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
    facts = [_there(reading.objects, s) for s in target.sprites if s in source.sprites]
    if edit.kind == "restyle":  # a style without hue drops tints: a sprite stayed as it was or without
        both = zip(source.sprites, target.sprites, strict=True)
        facts = [any(_there(reading.objects, s) for s in pair) for pair in both]
    if edit.kind != "restyle":
        facts.append(reading.style == target.style)
    if edit.kind != "background" and v.shows_background(target.style) and v.shows_background(source.style):
        facts.append(reading.background == target.background)
    return _done(edit, reading), sum(facts) / len(facts) if facts else 1.0


def _done(edit: Edit, reading: Reading) -> bool:
    """Whether what the instruction asked for is there."""
    source, target, found = edit.source, edit.target, reading.objects
    changed = [s for s in target.sprites if s not in source.sprites]
    gone = [s for s in source.sprites if s not in target.sprites]
    if edit.kind == "restyle":
        return reading.style == target.style
    if edit.kind == "background":
        return reading.background == target.background
    if edit.kind == "remove":
        return not any(f.object in {s.object for s in gone} for f in found)
    if edit.kind == "add":
        return any(_is_new(edit, f, changed[0], found) for f in found)
    if any(_there(found, s) for s in gone if edit.kind in ("replace", "move")):
        return False
    if edit.kind == "move":
        return any(_is_moved(f, gone[0], changed[0]) for f in found)
    return all(_there(found, s, 0.5) for s in changed)


def _is_named(f: Found, sprite: Sprite) -> bool:
    return f.object == sprite.object and (not f.colours or f.answers_to(sprite.colour))


def _is_new(edit: Edit, f: Found, added: Sprite, found: Sequence[Found]) -> bool:
    """Whether `f` is what was to be added, where it was to be."""
    if not _is_named(f, added):
        return False
    asked = [(r, s) for r in v.RELATIONS for s in edit.source.sprites if f" {r} the {s.object}" in edit.instruction]
    if not asked:
        return True
    (relation, anchor), *_ = asked
    return any(relation in relation_of(f.x - o.x, f.y - o.y, f.size, o.size) for o in found if _is_named(o, anchor))


def _is_moved(f: Found, before: Sprite, after: Sprite) -> bool:
    """Whether `f` stands in the half of the picture that it was moved to, and where it stood on the other axis."""
    if not _is_named(f, after):
        return False
    sideways = before.y == after.y
    (now, aim), (other, kept) = ((f.x, after.x), (f.y, after.y))[:: 1 if sideways else -1]
    half = v.SIZE / 2
    return (now < half) == (aim < half) and abs(other - kept) <= max(8.0, 0.5 * after.size)


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
        instructions = [e.instruction for e in edits[start:stop]]
        tries = {"best_of": config.best_of} if config.best_of > 1 else {}
        with warnings.catch_warnings():  # of sources that are unlike others, which are the world's own
            warnings.simplefilter("ignore", UserWarning)
            out = editor.edit(sources[start:stop], instructions, seeds, **tries)
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
        shown = torch.linspace(0, len(edits) - 1, min(len(edits), 28)).long().tolist()
        pairs = torch.stack([t for i in shown for t in (pil_to_tensor(sources[i]), pictures[i])])
        labels = [text for i in shown for text in ("", edits[i].instruction)]
        marks: list[bool | None] = [m for i in shown for m in (None, successes[i])]
        write_report(json_file, report, grid_png(pairs, labels, marks))
    return report
