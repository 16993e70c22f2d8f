"""Prompt files: JSON lines that say what to draw and what a picture of it must hold.

Design choices
- One object a line: `{"id", "task", "prompt", "groups": [[object, colour or null, count], ...], "relation":
  [i, "left of", j] or null, "background": name or null, "style": name or null}`. Null demands nothing. The last three
  may be left out. Our own files have the same shape as those that anyone brings.
- A bad line stops the run before anything is drawn, and the error names file, line and value: a benchmark that skips
  lines measures something else.
- What a style cannot show (tints in a sketch, the ground in neon) must not be demanded of it, nor more objects than the
  renderer could place: every prompt needs a true picture, or it has no ceiling.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.core.files import read_text_lines
from mm.core.safe_json import parse_json
from mm.world import vocabulary as v
from mm.world.scene import Group
from mm.world.tasks import Expectation

FOLDER = Path(__file__).parent / "prompts"
COMPOSE = FOLDER / "compose.jsonl"  # for reporting: compositions kept out of training
COMPOSE_TUNE = FOLDER / "compose-tune.jsonl"  # for choosing guidance, steps and the like
_NEEDED = ("id", "task", "prompt", "groups")
_OPTIONAL = ("relation", "background", "style")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt and what its pictures must hold; `id` names it within its file and seeds its pictures."""

    id: str
    text: str
    wanted: Expectation

    def __post_init__(self) -> None:
        _check_drawable(self.wanted)


def _check_drawable(wanted: Expectation) -> None:
    """Raises where no picture could show what is wanted."""
    style = wanted.style or v.DEFAULT_STYLE
    tints = {g.colour for g in wanted.groups} - {None}
    if wanted.task in ("colours", "colour attribution") and not tints:
        raise ValueError(f"task {wanted.task!r} needs a colour in its groups")
    hidden = sorted(tint for tint in tints if tint and tint not in v.colours_in(style))
    if hidden:
        raise ValueError(f"colour {hidden[0]!r} is not visible in style {style!r}")
    if wanted.background is not None and not v.shows_background(style):
        raise ValueError(f"style {style!r} shows no background, so {wanted.background!r} cannot be demanded")
    total, limit = sum(g.count for g in wanted.groups), v.MAX_SPRITES if v.smallest_sprite(style) < 44 else v.MAX_COUNT
    if total > limit:
        raise ValueError(f"{total} objects are wanted; a picture in style {style!r} holds at most {limit}")


def to_line(prompt: Prompt) -> str:
    """The prompt as one line of a file."""
    wanted = prompt.wanted
    row = {
        "id": prompt.id,
        "task": wanted.task,
        "prompt": prompt.text,
        "groups": [[g.object, g.colour, g.count] for g in wanted.groups],
        "relation": list(wanted.relation) if wanted.relation else None,
        "background": wanted.background,
        "style": wanted.style,
    }
    return json.dumps(row, ensure_ascii=False)


def from_line(line: str) -> Prompt:
    """Reads one line; a ValueError says what is wrong with it."""
    row = parse_json(line, "it")
    if not isinstance(row, dict):
        raise ValueError(f"a line is an object, got {type(row).__name__}")
    missing, unknown = [key for key in _NEEDED if key not in row], sorted(set(row) - {*_NEEDED, *_OPTIONAL})
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join((*_NEEDED, *_OPTIONAL))}")
    groups = row["groups"]
    if not isinstance(groups, list):
        raise ValueError(f"groups is {groups!r}, not a list of [object, colour or null, count]")
    wanted = Expectation(
        task=_text(row, "task"),
        groups=tuple(group_of(entry) for entry in groups),
        relation=_relation(row.get("relation")),
        background=one_of("background", row.get("background"), v.BACKGROUNDS),
        style=one_of("style", row.get("style"), v.STYLES),
    )
    return Prompt(id=_text(row, "id"), text=_text(row, "prompt"), wanted=wanted)


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{key} is {row[key]!r}, not a text")
    return row[key]


def one_of(key: str, value: object, known: tuple[str, ...]) -> str | None:
    """A known word or None. Raises ValueError for any other value of a file."""
    if value is not None and value not in known:
        raise ValueError(f"unknown {key} {value!r}; known: {', '.join(known)}, or null")
    return value if isinstance(value, str) else None


def group_of(entry: object) -> Group:
    """A group of a file's `[object, colour or null, count]`. Raises ValueError for anything else."""
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError(f"group {entry!r} is not [object, colour or null, count]")
    name, colour, count = entry
    if name not in v.ALL_OBJECTS:
        raise ValueError(f"unknown object {name!r}; known: {', '.join(v.ALL_OBJECTS)}")
    if type(count) is not int or not 1 <= count <= v.MAX_COUNT:
        raise ValueError(f"count of {name!r} is {count!r}, not a number from 1 to {v.MAX_COUNT}")
    return Group(object=name, colour=one_of("colour", colour, v.COLOURS), count=count)


def _relation(value: object) -> tuple[int, str, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or [type(part) for part in value] != [int, str, int]:
        raise ValueError(f'relation is {value!r}, not [group number, "left of", group number] or null')
    return (value[0], value[1], value[2])


def load_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file; empty lines are skipped, a bad one raises."""
    path = Path(path)
    lines = read_text_lines(path, "prompt file")
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = from_line(line)
            if prompt.id in seen:
                raise ValueError(f"id {prompt.id!r} was used in line {seen[prompt.id]}; give every prompt its own")
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompt; put one JSON object a line into it")
    return prompts
