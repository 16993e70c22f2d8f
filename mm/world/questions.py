"""Questions about a scene with their answers.

Design choices
- Six kinds: existence, count, colour, position, style, background. Nothing is asked that the picture cannot show, or
  whose answer is not the only right one (the colour of an object whose natural colours are several, say).
- Existence is balanced: a "yes" question comes with a "no" question, half of the time about a look-alike.
- Counting is of one kind of object, or now and then of a category (`vocabulary.CATEGORIES`), where zero may be right.
- Words are those of `mm.world.words`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mm.world import vocabulary as v
from mm.world.captions import article
from mm.world.scene import Group, Scene, group_relation, groups

KINDS: tuple[str, ...] = ("existence", "count", "colour", "position", "style", "background")
_COUNTS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True, kw_only=True, slots=True)
class QA:
    """A question, its one right answer, and its kind."""

    kind: str
    question: str
    answer: str


def _lookalikes(name: str) -> list[str]:
    return [b if a == name else a for a, b in v.LOOKALIKES if name in (a, b)]


def _existence(parts: tuple[Group, ...], objects: Sequence[str], rng: random.Random) -> list[QA]:
    present = {g.object for g in parts}
    there = rng.choice(sorted(present))
    near = [n for p in sorted(present) for n in _lookalikes(p) if n in objects and n not in present]
    absent = rng.choice(near if near and rng.random() < 0.5 else [o for o in objects if o not in present])
    wording = rng.choice(("is there {} in the picture?", "can you see {}?", "does the picture show {}?"))
    return [
        QA(kind="existence", question=wording.format(f"{article(name)} {name}"), answer=answer)
        for name, answer in ((there, "yes"), (absent, "no"))
    ]


def _count(scene: Scene, parts: tuple[Group, ...], rng: random.Random) -> list[QA]:
    name = rng.choice(parts).object
    noun, counted = v.PLURALS[name], {name}
    if rng.random() < 0.3:
        noun = rng.choice(list(v.CATEGORIES))
        counted = set(v.CATEGORIES[noun])
    number = sum(g.count for g in parts if g.object in counted)
    wording = rng.choice(("how many {} are there?", "how many {} can you see?", "what is the number of {}?"))
    out = [QA(kind="count", question=wording.format(noun), answer=_COUNTS[min(number, 4)])]
    return out if number <= v.MAX_COUNT else []


def _colour(scene: Scene, parts: tuple[Group, ...], rng: random.Random) -> list[QA]:
    known = [g for g in parts if _sole_colour(g, scene, parts)]
    if not known:
        return []
    group = rng.choice(known)
    verb, noun = ("is", group.object) if group.count == 1 else ("are", v.PLURALS[group.object])
    wording = rng.choice((f"what colour {verb} the {noun}?", f"which colour do the {noun} have?"))
    if group.count == 1:
        wording = f"what colour is the {noun}?"
    return [QA(kind="colour", question=wording, answer=_sole_colour(group, scene, parts) or "")]


def _sole_colour(group: Group, scene: Scene, parts: tuple[Group, ...]) -> str | None:
    """The colour of a group where it is the only right answer, else None."""
    if not v.shows_colour(scene.style) or sum(g.object == group.object for g in parts) > 1:
        return None
    natural = v.NATURAL_COLOURS[group.object]
    if group.colour is None:
        sole = natural[0] if len(natural) == 1 and natural[0] in v.colours_in(scene.style) else None
        return sole
    return group.colour


def _position(scene: Scene, parts: tuple[Group, ...], rng: random.Random) -> list[QA]:
    singles = [g for g in parts if g.count == 1 and sum(o.object == g.object for o in parts) == 1]
    if len(singles) < 2:
        return []
    a, b = rng.sample(singles, 2)
    held = group_relation(scene, a, b)
    if not held:
        return []
    asked = rng.choice(sorted(held)) if rng.random() < 0.5 else v.OPPOSITE[rng.choice(sorted(held))]
    answer = "yes" if asked in held else "no"
    return [QA(kind="position", question=f"is the {a.object} {asked} the {b.object}?", answer=answer)]


def _style(scene: Scene, rng: random.Random) -> list[QA]:
    wording = rng.choice(("what style is this?", "what is the style of the picture?", "which style is the picture in?"))
    return [QA(kind="style", question=wording, answer=scene.style)]


def _background(scene: Scene, rng: random.Random) -> list[QA]:
    if not v.shows_background(scene.style):
        return []
    wording = rng.choice(("what is the background?", "what is in the background?", "which background is this?"))
    return [QA(kind="background", question=wording, answer=scene.background)]


def questions(scene: Scene, rng: random.Random, *, objects: Sequence[str] = v.OBJECTS) -> list[QA]:
    """One question of each kind that the scene can answer (existence: a yes and a no, of one of `objects`)."""
    parts = groups(scene)
    if not parts:
        raise ValueError("a scene without sprites answers no question; give one with at least one")
    out = _existence(parts, objects, rng)
    for make in (_count, _colour, _position):
        out += make(scene, parts, rng)
    return out + _style(scene, rng) + _background(scene, rng)
