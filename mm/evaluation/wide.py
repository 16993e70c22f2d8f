"""Questions in any wording about held-out scenes: `mm eval understand --wide`.

Design choices
- A wording is a line of JSON: its kind and a sentence with slots ("how many {some} do you count?"). The sampler of its
  kind fills the slots for a scene and says which replies are right, from the scene itself and never from a reading.
- `prompts/wordings.jsonl` is for reporting. It was written before the reader of questions and never used to change
  it; `prompts/wordings-tune.jsonl` is for choosing. Scenes are held-out compositions, or seen ones for tuning.
- A reply is right where it begins with the right word; lists and descriptions are compared as sets of objects. The
  honest reply that a question is not understood is right for the kind "outside" alone.
- The score is the mean over kinds, so that kinds with many wordings do not dominate.
"""

from __future__ import annotations

import json
import random
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.core.files import read_text_lines
from mm.core.safe_json import parse_object
from mm.core.statistics import share
from mm.evaluation.prompts import FOLDER
from mm.evaluation.report import write_report
from mm.evaluation.understand import Reader, UnderstandConfig, held_out_scenes, to_pictures
from mm.evaluation.wide_samplers import SAMPLERS, Check
from mm.world.scene import Scene

WORDINGS = FOLDER / "wordings.jsonl"
TUNING_WORDINGS = FOLDER / "wordings-tune.jsonl"


@dataclass(frozen=True, kw_only=True)
class Wording:
    """A sentence with slots: `kind` says how they are filled; `fixed` are slots that the sentence already holds."""

    kind: str
    say: str
    fixed: dict[str, str]


def load_wordings(path: Path = WORDINGS) -> list[Wording]:
    """The wordings of a file. Raises UserError that names file and line."""
    out = []
    for number, line in enumerate(read_text_lines(path, "file of wordings"), 1):
        try:
            row = parse_object(line, "it")
            kind, say = row.pop("kind"), row.pop("say")
            if kind not in SAMPLERS:
                raise ValueError(f"unknown kind {kind!r}; known: {', '.join(SAMPLERS)}")
            out.append(Wording(kind=kind, say=say, fixed=row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: {error!r} in {line[:80]!r}") from error
    return out


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about scene number `scene` in a wording, and what is right."""

    scene: int
    wording: Wording
    text: str
    right: Check


def wide_questions(scenes: Sequence[Scene], wordings: Sequence[Wording], seed: int, each: int) -> list[Question]:
    """Every wording asked about `each` scenes that can answer it, chosen by `seed`."""
    out: list[Question] = []
    for wording in wordings:
        rng = random.Random(f"wide {seed} {wording.kind} {wording.say}")
        order = rng.sample(range(len(scenes)), len(scenes))
        asked = ((i, SAMPLERS[wording.kind](scenes[i], rng, wording.fixed)) for i in order)
        for i, made in [(i, made) for i, made in asked if made is not None][:each]:
            slots, right = made
            out.append(Question(scene=i, wording=wording, text=wording.say.format(**slots), right=right))
    return out


def evaluate_wide(
    reader: Reader,
    config: UnderstandConfig,
    *,
    wordings: Path | None = None,
    each: int = 6,
    json_file: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Asks every wording about `each` scenes and reports by kind; with `json_file`, writes the report."""
    path = wordings or (TUNING_WORDINGS if config.tuning else WORDINGS)
    scenes = held_out_scenes(config)
    pictures = to_pictures(scenes)
    asked = wide_questions(scenes, load_wordings(path), config.seed, each)
    answers: list[str] = []
    with warnings.catch_warnings():  # of questions that are not understood, which the score counts
        warnings.simplefilter("ignore", UserWarning)
        for start in range(0, len(asked), config.batch_size):
            part = asked[start : start + config.batch_size]
            answers += reader.answer([pictures[q.scene] for q in part], [q.text for q in part])
    right: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for question, answer in zip(asked, answers, strict=True):
        right[question.wording.kind].append(question.right(answer))
        if not right[question.wording.kind][-1]:
            row = {"kind": question.wording.kind, "scene": question.scene, "asked": question.text, "said": answer}
            wrong.append(row | {"wording": question.wording.say})
    tasks = {kind: share(right[kind]) for kind in SAMPLERS if right[kind]}
    every = share([x for verdicts in right.values() for x in verdicts])
    report = {
        "overall": round(sum(t["score"] for t in tasks.values()) / max(len(tasks), 1), 4),
        "all questions": every,
        "ceiling": 1.0,
        "n": len(asked),
        "wordings": len({question.wording.say for question in asked}),
        "tasks": tasks,
        "wrong": wrong,
        "settings": asdict(config) | {"wordings": path.name, "each": each} | (settings or {}),
    }
    if json_file is not None:
        write_report(json_file, report)
    return report


def to_line(wording: Wording) -> str:
    """A wording as a line of its file."""
    return json.dumps({"kind": wording.kind, "say": wording.say} | wording.fixed)
