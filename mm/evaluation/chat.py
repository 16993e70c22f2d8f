"""`mm eval chat`: scripted conversations, every turn judged.

Design choices
- A script is a line of JSON: what the user says, and what has to hold after it: a picture with these objects and none
  of those (`draws`), an answer (`asks`), the picture before the last (`undo`), or a reply without a picture (`says`).
  Ours (`mm.evaluation.chat_scripts`) keep to compositions that training never saw. `prompts/chat.jsonl` holds 20 of
  four turns in trained words, `prompts/chat-long.jsonl` 20 of twelve turns, half of which are off the script (`off`):
  greetings, thanks, questions and edits in other words than those of training, "another one", "undo".
- A picture is judged as in `mm eval compose` (`mm.world.tasks`): groups, relation, background, style; what was to go
  must be gone. A turn that draws must draw, and one that asks must not.
- An answer is compared with the judge's reading of the picture that was drawn last, not with what was asked for: a
  model that draws two owls instead of three and answers two is right in that turn.
- All turns count the same; the share of them that are right is the score, with the share of conversations without any
  fault beside it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mm.core.errors import UserError
from mm.core.files import read_text_lines
from mm.core.safe_json import parse_object
from mm.core.statistics import share
from mm.evaluation.compose import true_scene
from mm.evaluation.prompts import FOLDER, Prompt, group_of, one_of
from mm.evaluation.report import grid_png, write_report
from mm.world import vocabulary as v
from mm.world.judge import Judge, Reading
from mm.world.render import render
from mm.world.tasks import Expectation, satisfies

SCRIPTS = FOLDER / "chat.jsonl"
LONG_SCRIPTS = FOLDER / "chat-long.jsonl"
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


class Converser(Protocol):
    """A model to evaluate."""

    def chat(
        self, turns: Sequence[str], *, seed: int = 0, steps: int = 12, best_of: int = 1
    ) -> list[tuple[str, Image.Image | None]]:
        """Text and picture of each reply; `best_of` as in `mm.pipelines.best_of`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the user says and what has to hold then.

    Args:
        say: In the user's words.
        draws: A picture that holds this.
        gone: Objects that it must not hold.
        asks: Kind and object of a question.
        undo: The picture before the last one is shown again.
        says: A reply without a picture, of a kind of `REPLIES`.
        off: Whether the turn is off the script of draw, edit and ask in trained words.
    """

    say: str
    draws: Expectation | None = None
    gone: tuple[str, ...] = ()
    asks: tuple[str, str] | None = None
    undo: bool = False
    says: str | None = None
    off: bool = False

    @property
    def kind(self) -> str:
        """ "draws", "asks", "undo" or "says"."""
        return "draws" if self.draws is not None else "asks" if self.asks else "undo" if self.undo else "says"


# What a reply in words must hold, by kind.
REPLIES: dict[str, str] = {
    "greeting": r"\b(?:hello|hi|welcome)\b",
    "thanks": r"\bwelcome\b|\bthank you\b",
    "help": r"\bdraw\b",
    "outside": r"\bdo not (?:know|understand)\b",
    "refusal": r"\b(?:cannot|there is no)\b",
}


def load_scripts(path: Path = SCRIPTS) -> list[list[Turn]]:
    """The conversations of a file. Raises UserError that names file and line."""
    out = []
    for number, line in enumerate(read_text_lines(path, "script file"), 1):
        try:
            out.append(_turns(parse_object(line, "it").get("turns")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = error if isinstance(error, ValueError) else repr(error)
            raise UserError(f"{path}, line {number}: {why}, in {line[:80]!r}") from error
    if not out:
        raise UserError(f"{path} holds no script; put one JSON object a line into it")
    return out


def _turns(rows: object) -> list[Turn]:
    if not isinstance(rows, list) or not rows:
        raise ValueError("it has no list of turns")
    turns = [_turn(row) for row in rows]
    if wrong := [turn.say for turn in turns if not isinstance(turn.say, str) or not turn.say.strip()]:
        raise ValueError(f"say is {wrong[0]!r}, not a text")
    return turns


def _turn(row: dict[str, Any]) -> Turn:
    off = bool(row.get("off"))
    if row.get("undo"):
        return Turn(say=row["say"], undo=True, off=off)
    if "says" in row:
        if row["says"] not in REPLIES:
            raise ValueError(f"unknown kind of reply {row['says']!r}; known: {', '.join(REPLIES)}")
        return Turn(say=row["say"], says=row["says"], off=off)
    if "asks" in row:
        kind, name = row["asks"]
        if kind not in _ANSWERS:
            raise ValueError(f"unknown kind of question {kind!r}; known: {', '.join(_ANSWERS)}")
        return Turn(say=row["say"], asks=(kind, name), off=off)
    wanted = row["draws"]
    parts = tuple(group_of(list(entry)) for entry in wanted["groups"])
    relation = tuple(wanted["relation"]) if wanted.get("relation") else None
    draws = Expectation(
        task="position" if relation else "two objects",
        groups=parts,
        relation=relation,
        background=one_of("background", wanted.get("background"), v.BACKGROUNDS),
        style=one_of("style", wanted.get("style"), v.STYLES),
    )
    return Turn(say=row["say"], draws=draws, gone=tuple(wanted.get("gone", ())), off=off)


def _count(reading: Reading, name: str) -> set[str]:
    counted = v.CATEGORIES.get(name, (name,))
    number = sum(f.object in counted for f in reading.objects)
    return {"zero", "none"} if number == 0 else {_NUMBERS[min(number, 6)]}


def _colours(reading: Reading, name: str) -> set[str]:
    return {str(c) for f in reading.objects if f.object == name for c in f.colours if c is not None}


# Which answers the judge's reading of the last picture allows.
_ANSWERS: dict[str, Any] = {
    "count": _count,
    "existence": lambda reading, name: {"yes" if any(f.object == name for f in reading.objects) else "no"},
    "colour": _colours,
    "background": lambda reading, _: {reading.background},
    "style": lambda reading, _: {reading.style},
    "ground": lambda reading, name: {"yes" if reading.background == name else "no"},
    "tint": lambda reading, name: {"yes" if (part := name.split())[1] in _colours(reading, part[0]) else "no"},
}


def judge_turn(turn: Turn, said: str, drawn: Reading | None, last: Reading | None, back: bool = False) -> bool:
    """Whether a turn is right.

    Args:
        turn: What had to hold.
        said: The words of the reply.
        drawn: What the judge reads in this turn's picture.
        last: What it reads in the latest picture.
        back: Whether this turn's picture is the one before the last.
    """
    if turn.undo:
        return back
    if turn.says is not None:
        return drawn is None and re.search(REPLIES[turn.says], said.lower()) is not None
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
    scripts: Sequence[Path] = (SCRIPTS, LONG_SCRIPTS),
    limit: int | None = None,
    seed: int = 0,
    best_of: int = 1,
    json_file: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Converses, judges and reports; with `json_file`, writes it and a grid PNG of all turns beside it.

    `limit`: only this many conversations of each file.
    """
    every = [script for path in scripts for script in load_scripts(path)[:limit]]
    tries = {"best_of": best_of} if best_of > 1 else {}
    verdicts: list[list[bool]] = []
    cells: list[tuple[torch.Tensor, str, bool]] = []
    log: list[dict[str, Any]] = []
    for k, script in enumerate(every):
        with warnings.catch_warnings():  # of words that are not understood, on which some turns rest
            warnings.simplefilter("ignore", UserWarning)
            replies = model.chat([turn.say for turn in script], seed=seed + 1000 * k, **tries)
        last, right = None, []
        shown: list[torch.Tensor] = []
        for turn, (said, picture) in zip(script, replies, strict=True):
            pixels = None if picture is None else pil_to_tensor(picture)
            drawn = None if pixels is None else judge.read(pixels[None])[0]
            last = drawn or last
            back = pixels is not None and len(shown) > 1 and torch.equal(pixels, shown[-2])
            if turn.undo and back:
                shown.pop()
            elif pixels is not None:
                shown.append(pixels)
            right.append(judge_turn(turn, said, drawn, last, back))
            blank = torch.full((3, v.SIZE, v.SIZE), 255, dtype=torch.uint8)
            cells.append((blank if pixels is None else pixels, f"{turn.say} {said}".strip(), right[-1]))
            row = {"script": k, "say": turn.say, "kind": turn.kind, "off": turn.off, "said": said}
            log.append(row | {"drew": picture is not None, "right": right[-1]})
        verdicts.append(right)
    report = {
        "ceiling": _ceiling(every, judge, seed),
        "overall": share([row["right"] for row in log])["score"],
        "n": len(log),
        "tasks": _tasks(log),
        "faultless": share([all(right) for right in verdicts]),
        "turns": log,
        "settings": {"seed": seed, "best_of": best_of, "scripts": [path.name for path in scripts]} | (settings or {}),
    }
    if json_file is not None:
        pictures, labels, marks = zip(*cells, strict=True)
        write_report(json_file, report, grid_png(torch.stack(pictures), labels, marks))
    return report


def _tasks(log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right turns: all, by kind, and off the script."""
    rows = {"all turns": [row["right"] for row in log]}
    rows |= {kind: [row["right"] for row in log if row["kind"] == kind] for kind in ("draws", "asks", "says", "undo")}
    rows["off script"] = [row["right"] for row in log if row["off"]]
    return {name: share(right) for name, right in rows.items()}


def _ceiling(scripts: Sequence[Sequence[Turn]], judge: Judge, seed: int) -> float:
    """The share of right turns of a model that draws true renders and answers what the judge reads."""
    asked = [(f"{k} {i}", turn) for k, script in enumerate(scripts) for i, turn in enumerate(script)]
    right = [turn.draws is None for _, turn in asked]
    drawn = [(i, name, turn) for i, (name, turn) in enumerate(asked) if turn.draws is not None]
    scenes = [true_scene(Prompt(id=name, text=t.say, wanted=t.draws), seed) for _, name, t in drawn if t.draws]
    for (i, _, turn), reading in zip(drawn, judge.read(render(scenes)), strict=True):
        right[i] = judge_turn(turn, "", reading, reading)
    return share(right)["score"]
