"""`mm eval chat`: scripted conversations of four turns, every turn judged.

Design choices
- A script is a line of JSON: what the user says, and what has to hold after it: a picture with these objects and none
  of those (`draws`), or an answer (`asks`). Ours, `prompts/chat.jsonl`, keep to compositions that training never saw.
- A picture is judged as in `mm eval compose` (`mm.world.tasks`): groups, relation, background, style; what was to go
  must be gone. A turn that draws must draw, and one that asks must not.
- An answer is compared with the judge's reading of the picture that was drawn last, not with what was asked for: a
  model that draws two owls instead of three and answers two is right in that turn.
- All turns count the same; the share of them that are right is the score, with the share of conversations without any
  fault beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mm.core.errors import UserError
from mm.core.files import read_text_lines, write_json, write_text
from mm.core.safe_json import parse_object
from mm.core.statistics import share
from mm.evaluation.compose import true_scene
from mm.evaluation.prompts import FOLDER, Prompt
from mm.evaluation.report import save_grid
from mm.world import vocabulary as v
from mm.world.captions import BACKGROUND_PHRASES, article, group_phrase
from mm.world.edits import edit_scene
from mm.world.judge import Judge, Reading
from mm.world.render import render
from mm.world.scene import Group, Scene, groups, sample_scene
from mm.world.tasks import Expectation, satisfies

SCRIPTS = FOLDER / "chat.jsonl"
TURNS = 4
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


class Converser(Protocol):
    """A model to evaluate."""

    def chat(self, turns: Sequence[str], *, seed: int = 0, steps: int = 12) -> list[tuple[str, Image.Image | None]]:
        """Text and picture of each reply."""
        ...


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the user says and what has to hold then: `draws` (with `gone` objects), or `asks` = (kind, object)."""

    say: str
    draws: Expectation | None = None
    gone: tuple[str, ...] = ()
    asks: tuple[str, str] | None = None


def load_scripts(path: Path = SCRIPTS) -> list[list[Turn]]:
    """The conversations of a file. Raises UserError that names file and line."""
    out = []
    for number, line in enumerate(read_text_lines(path, "script file"), 1):
        try:
            out.append([_turn(row) for row in parse_object(line, "it")["turns"]])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: {error!r} in {line[:80]!r}") from error
    return out


def _turn(row: dict[str, Any]) -> Turn:
    if "asks" in row:
        kind, name = row["asks"]
        if kind not in _ANSWERS:
            raise ValueError(f"unknown kind of question {kind!r}; known: {', '.join(_ANSWERS)}")
        return Turn(say=row["say"], asks=(kind, name))
    wanted = row["draws"]
    parts = tuple(Group(object=o, colour=c, count=n) for o, c, n in wanted["groups"])
    relation = tuple(wanted["relation"]) if wanted.get("relation") else None
    draws = Expectation(
        task="position" if relation else "two objects",
        groups=parts,
        relation=relation,
        background=wanted.get("background"),
        style=wanted.get("style"),
    )
    return Turn(say=row["say"], draws=draws, gone=tuple(wanted.get("gone", ())))


def _count(reading: Reading, name: str) -> str:
    counted = v.CATEGORIES.get(name, (name,))
    return _NUMBERS[min(sum(f.object in counted for f in reading.objects), 6)]


def _colours(reading: Reading, name: str) -> set[str]:
    return {str(c) for f in reading.objects if f.object == name for c in f.colours if c is not None}


# Which answers the judge's reading of the last picture allows.
_ANSWERS: dict[str, Any] = {
    "count": lambda reading, name: {_count(reading, name)},
    "existence": lambda reading, name: {"yes" if any(f.object == name for f in reading.objects) else "no"},
    "colour": _colours,
    "background": lambda reading, _: {reading.background},
    "style": lambda reading, _: {reading.style},
}


def judge_turn(turn: Turn, said: str, drawn: Reading | None, last: Reading | None) -> bool:
    """Whether a turn is right; `drawn`: what the judge reads in this turn's picture, `last`: in the latest one."""
    if turn.asks is not None:
        kind, name = turn.asks
        if drawn is not None or last is None or not last.readable:
            return False
        return said.strip(" .") in _ANSWERS[kind](last, name)
    assert turn.draws is not None
    if drawn is None:
        return False
    verdict = satisfies(drawn, turn.draws)
    stays = not any(f.object in turn.gone for f in drawn.objects)
    return verdict.ok and verdict.background_ok is not False and verdict.style_ok is not False and stays


def evaluate_chat(
    model: Converser,
    judge: Judge,
    *,
    scripts: Path = SCRIPTS,
    limit: int | None = None,
    seed: int = 0,
    json_file: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Converses, judges and reports; with `json_file`, writes it and a grid PNG of all turns beside it."""
    every = load_scripts(scripts)[:limit]
    verdicts: list[list[bool]] = []
    cells: list[tuple[torch.Tensor, str, bool]] = []
    log = []
    for k, script in enumerate(every):
        replies = model.chat([turn.say for turn in script], seed=seed + 1000 * k)
        last, right = None, []
        for turn, (said, picture) in zip(script, replies, strict=True):
            pixels = None if picture is None else pil_to_tensor(picture)
            drawn = None if pixels is None else judge.read(pixels[None])[0]
            last = drawn or last
            right.append(judge_turn(turn, said, drawn, last))
            blank = torch.full((3, v.SIZE, v.SIZE), 255, dtype=torch.uint8)
            cells.append((blank if pixels is None else pixels, f"{turn.say} {said}".strip(), right[-1]))
            log.append({"script": k, "say": turn.say, "said": said, "drew": picture is not None, "right": right[-1]})
        verdicts.append(right)
    draws = [x for s, r in zip(every, verdicts, strict=True) for t, x in zip(s, r, strict=True) if t.draws is not None]
    asks = [x for s, r in zip(every, verdicts, strict=True) for t, x in zip(s, r, strict=True) if t.asks is not None]
    report = {
        "ceiling": _ceiling(every, judge, seed),
        "overall": share([x for right in verdicts for x in right])["score"],
        "n": sum(map(len, verdicts)),
        "tasks": {"all turns": share([x for r in verdicts for x in r]), "draws": share(draws), "asks": share(asks)},
        "faultless": share([all(right) for right in verdicts]),
        "turns": log,
        "settings": {"seed": seed, "scripts": scripts.name} | (settings or {}),
    }
    if json_file is not None:
        write_json(json_file, report)
        pictures, labels, marks = zip(*cells, strict=True)
        save_grid(json_file.with_suffix(".png"), torch.stack(pictures), labels, marks)
    return report


def _ceiling(scripts: Sequence[Sequence[Turn]], judge: Judge, seed: int) -> float:
    """The share of right turns of a model that draws true renders and answers what the judge reads."""
    asked = [(f"{k} {i}", turn) for k, script in enumerate(scripts) for i, turn in enumerate(script)]
    right = [turn.asks is not None for _, turn in asked]
    drawn = [(i, name, turn) for i, (name, turn) in enumerate(asked) if turn.draws is not None]
    scenes = [true_scene(Prompt(id=name, text=t.say, wanted=t.draws), seed) for _, name, t in drawn if t.draws]
    for (i, _, turn), reading in zip(drawn, judge.read(render(scenes)), strict=True):
        right[i] = judge_turn(turn, "", reading, reading)
    return share(right)["score"]


def _wanted(scene: Scene, gone: Sequence[str] = (), relation: Any = None) -> dict[str, Any]:
    """What a picture of `scene` must hold, as a script says it."""
    parts = [[g.object, g.colour, g.count] for g in groups(scene)]
    out: dict[str, Any] = {"groups": parts, "background": scene.background}
    return out | ({"gone": list(gone)} if gone else {}) | ({"relation": relation} if relation else {})


def _edit_turn(scene: Scene, rng: random.Random) -> tuple[Scene, dict[str, Any]]:
    """A random edit of what should be there now, and the state after it."""
    kinds = ["add", "recolour", "remove", "replace", "background"]
    rng.shuffle(kinds)
    edit = next(e for kind in kinds for _ in range(9) if (e := edit_scene(scene, rng, kind)) is not None)
    before, after = {s.object for s in scene.sprites}, {s.object for s in edit.target.sprites}
    relation = None
    names = [g.object for g in groups(edit.target)]
    new = next(iter(after - before), None)
    for name in v.RELATIONS:
        anchor = next((o for o in names if edit.instruction.endswith(f"{name} the {o}")), None)
        if edit.kind == "add" and new and anchor:
            relation = [names.index(new), name, names.index(anchor)]
    row = {"say": edit.instruction, "draws": _wanted(edit.target, sorted(before - after), relation)}
    return edit.target, row


def _question_turn(scene: Scene, rng: random.Random) -> dict[str, Any]:
    name = rng.choice([s.object for s in scene.sprites])
    kind = rng.choice(("count", "animals", "existence", "colour", "background"))
    if kind == "animals":
        return {"say": "how many animals are there?", "asks": ["count", "animals"]}
    if kind == "existence":
        name = rng.choice((name, rng.choice(v.OBJECTS)))
        return {"say": f"is there {article(name)} {name} in the picture?", "asks": ["existence", name]}
    tinted = [g.object for g in groups(scene) if g.colour is not None and g.count == 1]
    if kind == "colour" and tinted:
        return {"say": f"what colour is the {tinted[0]}?", "asks": ["colour", tinted[0]]}
    if kind == "background":
        return {"say": "what is the background?", "asks": ["background", ""]}
    return {"say": f"how many {v.PLURALS[name]} are there?", "asks": ["count", name]}


def _first_scene(rng: random.Random) -> Scene:
    while True:
        scene = sample_scene(rng, styles=(v.DEFAULT_STYLE,), held_out=True)
        if len(scene.sprites) <= 2:
            return scene


def write_scripts(path: Path = SCRIPTS, count: int = 20, seed: int = 0) -> None:
    """Writes our own scripts: draw, edit, ask, then edit or ask again."""
    rng = random.Random(f"chat report {seed}")
    lines = []
    for _ in range(count):
        scene = _first_scene(rng)
        phrases = " and ".join(group_phrase(g, rng, plain=True) for g in groups(scene))
        turns = [{"say": f"draw {phrases} {BACKGROUND_PHRASES[scene.background][0]}", "draws": _wanted(scene)}]
        scene, row = _edit_turn(scene, rng)
        turns += [row, _question_turn(scene, rng)]
        if rng.random() < 0.5:
            scene, row = _edit_turn(scene, rng)
            turns.append(row)
        else:
            turns.append(_question_turn(scene, rng))
        lines.append(json.dumps({"turns": turns}))
    write_text(path, "\n".join(lines) + "\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description="Writes the scripts of mm eval chat into the package.").parse_args()
    write_scripts()
