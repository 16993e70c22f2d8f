"""Slots and right replies of wordings: a sampler for each kind of question (`mm.evaluation.wide`).

Design choices
- A sampler fills the slots of a wording for a scene and says which replies are right, from the scene itself and never
  from a reading. It returns None where the scene cannot answer such a question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from mm.world import vocabulary as v
from mm.world.captions import article
from mm.world.facts import read_caption
from mm.world.scene import Group, Scene, group_relation, groups

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
Slots = dict[str, str]
Check = Callable[[str], bool]
Asked = tuple[Slots, Check]


def _begins(*right: str) -> Check:
    """Right where the reply is, or begins with, one of these words."""
    return lambda said: re.match(r"[\w ]*", said.strip(" ."))[0].strip() in right or said.strip(" .") in right  # type: ignore[index]


def _yes(holds: bool) -> Check:
    return lambda said: said.split(",")[0].strip(" .") == ("yes" if holds else "no")


def _is_honest(said: str) -> bool:
    return bool(re.search(r"\bdo not (?:know|understand)\b", said))


def _names(wanted: set[str]) -> Check:
    def check(said: str) -> bool:
        found = {g.object for g in read_caption(said).groups}
        return found == wanted and (bool(wanted) or said.strip(" .") in ("none", "nothing"))

    return check


def _a(name: str) -> str:
    return f"{article(name)} {name}"


def _about(name: str, number: int) -> Slots:
    """The slots of a thing that is named with an article."""
    one = number == 1
    the = f"the {name if one else v.PLURALS[name]}"
    words = (
        {"the": the, "is": "is", "does": "does", "has": "has"}
        if one
        else {"the": the, "is": "are", "does": "do", "has": "have"}
    )
    return words | {"a": _a(name), "some": v.PLURALS[name], "one": name}


def _number(scene: Scene, name: str) -> int:
    return sum(s.object == name for s in scene.sprites)


def _either(scene: Scene, rng: random.Random) -> str:
    """An object that is there, or is not, with equal chance; absent ones are similar to a present one at times."""
    present = sorted({s.object for s in scene.sprites})
    if rng.random() < 0.5:
        return rng.choice(present)
    near = [b if a in present else a for a, b in v.LOOKALIKES if (a in present) != (b in present)]
    return rng.choice(near) if near and rng.random() < 0.3 else rng.choice([o for o in v.OBJECTS if o not in present])


def _absent(scene: Scene, rng: random.Random) -> str:
    present = {s.object for s in scene.sprites}
    return rng.choice([o for o in v.OBJECTS if o not in present])


def _existence(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    name = _either(scene, rng)
    return _about(name, 1), _yes(_number(scene, name) > 0)


def _absence(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    name = _either(scene, rng)
    there = _number(scene, name) > 0
    return _about(name, 1), lambda said: there == ("there is no" not in said) and "there" in said


def _count(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    name = rng.choice(sorted({s.object for s in scene.sprites})) if rng.random() < 0.7 else _absent(scene, rng)
    number = _number(scene, name)
    right = ("zero", "none") if number == 0 else (_NUMBERS[number], str(number))
    return _about(name, 2), _begins(*right)


def _is_number(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    name = _either(scene, rng) if rng.random() < 0.3 else rng.choice(sorted({s.object for s in scene.sprites}))
    number = _number(scene, name)
    asked = number if number > 1 and rng.random() < 0.5 else rng.choice((2, 3, 4))
    return _about(name, 2) | {"n": _NUMBERS[asked]}, _yes(asked == number)


def _sole(scene: Scene) -> list[tuple[Group, str]]:
    """Groups whose colour is the only right answer, with it."""
    out = []
    for group in groups(scene):
        natural = v.NATURAL_COLOURS[group.object]
        colour = group.colour or (natural[0] if len(natural) == 1 and natural[0] in v.colours_in(scene.style) else None)
        alone = sum(g.object == group.object for g in groups(scene)) == 1
        if v.shows_colour(scene.style) and alone and colour is not None:
            out.append((group, colour))
    return out


def _colour(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    known = _sole(scene)
    if not known:
        return None
    group, colour = rng.choice(known)
    return _about(group.object, group.count), _begins(colour)


def _tint(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    known = _sole(scene)
    if not known:
        return None
    group, colour = rng.choice(known)
    asked = colour if rng.random() < 0.5 else rng.choice(v.COLOURS)
    if asked != colour and v.counts_as(group.object, group.colour, asked):
        return None
    return _about(group.object, group.count) | {"colour": asked}, _yes(asked == colour)


def _not_tint(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    made = _tint(scene, rng, fixed)
    if made is None:
        return None
    slots, is_so = made
    return slots, lambda said: said.startswith(("yes", "no")) and not is_so(said)


def _singles(scene: Scene) -> list[Group]:
    parts = groups(scene)
    return [g for g in parts if g.count == 1 and sum(o.object == g.object for o in parts) == 1]


def _position(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    singles = _singles(scene)
    if len(singles) < 2:
        return None
    a, b = rng.sample(singles, 2)
    held = group_relation(scene, a, b)
    if not held:
        return None
    fitting = sorted(held if rng.random() < 0.5 else {v.OPPOSITE[r] for r in held})
    relation = fixed.get("relation") or rng.choice(fitting)
    if relation not in held and v.OPPOSITE[relation] not in held:
        return None
    slots = {"first": f"the {a.object}", "second": f"the {b.object}", "relation": relation}
    return slots, _yes(relation in held)


def _which(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    singles = _singles(scene)
    if len(singles) != len(groups(scene)) or len(singles) != 2:
        return None
    a, b = rng.sample(singles, 2)
    held = sorted(group_relation(scene, a, b))
    if not held or ("relation" in fixed and fixed["relation"] not in held):
        return None
    return {"second": f"the {b.object}", "relation": fixed.get("relation", held[0])}, _names({a.object})


def _style(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    return {}, _begins(scene.style)


def _is_style(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    asked = scene.style if rng.random() < 0.5 else rng.choice(v.STYLES)
    return {"style": asked}, _yes(asked == scene.style)


def _shown(
    make: Callable[[Scene, random.Random, Slots], Asked | None],
) -> Callable[[Scene, random.Random, Slots], Asked | None]:
    return lambda scene, rng, fixed: make(scene, rng, fixed) if v.shows_background(scene.style) else None


def _is_ground(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    holds = scene.background == fixed["ground"]
    return ({}, _yes(holds)) if holds or rng.random() < 0.3 else None  # as many yes as no, roughly


def _daytime(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    night = scene.background == "night"
    return ({}, _yes(not night)) if night or (rng.random() < 0.3 and scene.background != "plain") else None


def _time(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    night = scene.background == "night"
    right = _begins("night" if night else "day")
    return ({}, right) if night or (rng.random() < 0.3 and scene.background != "plain") else None


def _list(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    return {}, _names({s.object for s in scene.sprites if s.object in v.CATEGORIES[fixed["category"]]})


def _describe(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    return {}, _names({s.object for s in scene.sprites})


def _colours(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    known = _sole(scene)
    wanted = {colour for _, colour in known}
    if len(known) < len(groups(scene)):
        return None
    return {}, lambda said: {w for w in re.findall(r"\w+", said) if w in v.COLOURS} == wanted


def _two(scene: Scene, rng: random.Random) -> tuple[str, str, int, int]:
    """Two objects, each there or not, and their numbers."""
    first = rng.choice(sorted({s.object for s in scene.sprites}))
    present = [o for o in sorted({s.object for s in scene.sprites}) if o != first]
    second = rng.choice(present) if present and rng.random() < 0.6 else rng.choice([o for o in v.OBJECTS if o != first])
    pair = (first, second) if rng.random() < 0.5 else (second, first)
    return (*pair, _number(scene, pair[0]), _number(scene, pair[1]))


def _pair_slots(a: str, b: str) -> Slots:
    return {"some": v.PLURALS[a], "others": v.PLURALS[b], "a": _a(a), "other": _a(b), "one": a, "otherone": b}


def _compare(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    a, b, x, y = _two(scene, rng)
    return _pair_slots(a, b), _yes({"more": x > y, "fewer": x < y, "same": x == y}[fixed["sign"]])


def _most(scene: Scene, rng: random.Random, fixed: Slots) -> Asked | None:
    a, b, x, y = _two(scene, rng)
    return None if x == y else (_pair_slots(a, b), _names({a if x > y else b}))


def _joined(test: Callable[[bool, bool], bool]) -> Callable[[Scene, random.Random, Slots], Asked]:
    def sample(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
        a, b, x, y = _two(scene, rng)
        if rng.random() < 0.3:
            (a, b), x, y = _absent_pair(scene, rng), 0, 0
        return _pair_slots(a, b), _yes(test(x > 0, y > 0))

    return sample


def _absent_pair(scene: Scene, rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample([o for o in v.OBJECTS if o not in {s.object for s in scene.sprites}], 2)
    return a, b


def _outside(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    return {}, _is_honest


def _absent_colour(scene: Scene, rng: random.Random, fixed: Slots) -> Asked:
    slots = _about(_absent(scene, rng), 1) | {"colour": rng.choice(v.COLOURS)}
    return slots, lambda said: "there is no" in said


SAMPLERS: dict[str, Callable[[Scene, random.Random, Slots], Asked | None]] = {
    "existence": _existence, "absence": _absence, "count": _count, "number": _is_number, "colour": _colour,
    "tint": _tint, "not tint": _not_tint, "position": _position, "which": _which, "style": _style,
    "is style": _is_style, "background": _shown(lambda scene, rng, fixed: ({}, _begins(scene.background))),
    "is ground": _shown(_is_ground), "daytime": _shown(_daytime), "time": _shown(_time), "describe": _describe,
    "list": _list, "colours": _colours, "compare": _compare, "most": _most, "all": _joined(lambda x, y: x and y),
    "any": _joined(lambda x, y: x or y), "none": _joined(lambda x, y: not x and not y), "outside": _outside,
    "absent colour": _absent_colour,
}  # fmt: skip
