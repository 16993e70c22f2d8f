"""GenEval's six tasks on the world: what a prompt demands, and whether a reading grants it.

Design choices
- The rules are GenEval's (arXiv 2310.11513): counting demands exactly n, the other tasks at least what was asked and
  never punish extras; a position is judged on the most confident objects of each group, all pairs of which must agree.
- Style and background are judged apart and never decide a task. An unreadable picture fails everything.
- `sample_task` makes a true scene with its demand, which measures the judge's own ceiling.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mm.world import vocabulary as v
from mm.world.judge import Found, Reading
from mm.world.scene import Group, Scene, group_relation, place, relation_of

TASKS: tuple[str, ...] = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
_COLOURED = frozenset({"colours", "colour attribution"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Expectation:
    """What a prompt demands. A group's colour None demands none; `relation` is (group index, relation, group index)."""

    task: str
    groups: tuple[Group, ...]
    relation: tuple[int, str, int] | None = None
    background: str | None = None
    style: str | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; known: {', '.join(TASKS)}")
        if not self.groups:
            raise ValueError(f"an expectation of task {self.task!r} needs at least one group")
        if (self.task == "position") != (self.relation is not None):
            raise ValueError(f"task {self.task!r} and relation {self.relation!r} do not go together")
        if self.relation is not None:
            first, name, second = self.relation
            if name not in v.RELATIONS:
                raise ValueError(f"unknown relation {name!r}; known: {', '.join(v.RELATIONS)}")
            if first == second or not {first, second} <= set(range(len(self.groups))):
                raise ValueError(f"relation {self.relation} must name two of {len(self.groups)} groups")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether the task was met, and why not; style and background are None where nothing was demanded."""

    ok: bool
    reason: str = ""
    readable: bool = True
    background_ok: bool | None = None
    style_ok: bool | None = None


def satisfies(reading: Reading, expectation: Expectation) -> Verdict:
    """Judges one picture's reading against what its prompt demanded."""
    wants_background, wants_style = expectation.background is not None, expectation.style is not None
    if not reading.readable:
        return Verdict(
            ok=False,
            reason="unreadable",
            readable=False,
            background_ok=False if wants_background else None,
            style_ok=False if wants_style else None,
        )
    reason = _shortfall(reading, expectation)
    return Verdict(
        ok=not reason,
        reason=reason,
        background_ok=reading.background == expectation.background if wants_background else None,
        style_ok=reading.style == expectation.style if wants_style else None,
    )


def _matching(reading: Reading, group: Group) -> list[Found]:
    """Objects of the group's kind and colour, the most confident first."""
    found = [f for f in reading.objects if f.object == group.object]
    found = [f for f in found if group.colour is None or f.answers_to(group.colour)]
    return sorted(found, key=lambda f: -f.confidence)


def _shortfall(reading: Reading, expectation: Expectation) -> str:
    """What is missing, in words; empty when nothing is."""
    chosen: list[list[Found]] = []
    for group in expectation.groups:
        found = _matching(reading, group)
        wanted = " ".join(filter(None, (str(group.count), group.colour, v.plural(group.object, group.count))))
        if len(found) < group.count or (expectation.task == "counting" and len(found) != group.count):
            return f"wanted {wanted}, found {len(found)}"
        chosen.append(found[: group.count])
    if expectation.relation is None:
        return ""
    first, name, second = expectation.relation
    for a in chosen[first]:
        for b in chosen[second]:
            holds = relation_of(a.x - b.x, a.y - b.y, a.size, b.size)
            if name not in holds:
                return f"wanted {a.object} {name} {b.object}, found {' and '.join(sorted(holds)) or 'neither'}"
    return ""


def sample_task(
    rng: random.Random, task: str, *, style: str, objects: Sequence[str] = v.OBJECTS
) -> tuple[Scene, Expectation]:
    """A random true scene of a task in `style`, with what it would have been asked for."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if task in _COLOURED and not v.shows_colour(style):
        raise ValueError(f"task {task!r} cannot be asked in style {style!r}, which shows no colour")
    n_groups = 1 if task in ("single object", "counting", "colours") else 2
    tints = v.colours_in(style)
    background = rng.choice(v.BACKGROUNDS) if v.shows_background(style) else "plain"
    while True:
        names = rng.sample(list(objects), n_groups)
        count = rng.randint(2, v.MAX_COUNT) if task == "counting" else 1
        asked = rng.sample(tints, n_groups) if task in _COLOURED else [None] * n_groups
        # Where no colour is asked, sprites come in any.
        drawn = [c or (rng.choice(tints) if tints and rng.random() < 0.5 else None) for c in asked]
        parts = [Group(object=o, colour=c, count=count) for o, c in zip(names, drawn, strict=True)]
        sprites = place(rng, parts, style)
        if sprites is None:
            continue
        scene = Scene(sprites=sprites, background=background, style=style)
        relation = None
        if task == "position":
            holds = sorted(group_relation(scene, parts[0], parts[1]))
            if not holds:
                continue
            relation = (0, rng.choice(holds), 1)
        wanted = tuple(Group(object=o, colour=c, count=count) for o, c in zip(names, asked, strict=True))
        ground = background if v.shows_background(style) else None
        return scene, Expectation(task=task, groups=wanted, relation=relation, background=ground, style=style)
