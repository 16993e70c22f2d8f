"""Prompts of the world by which an erasure is measured; see `mm.erasure.probes`.

Design choices
- Plain probes are captions of the training grammar, as in UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846): one
  object, or two, in each style in turn. Two objects that never meet in training are kept for reporting.
- "wording" is what the grammar does not say: requests, other orders of words, added adjectives, bare words. No method
  makes a patch from such prompts.
- Every prompt is made by a generator that is seeded by split, role and concept; reported prompts are none that are used
  for making patches or for tuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from mm.erasure.concepts import Concept
from mm.erasure.probes import Probe, Role, Split
from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.scene import Group, Scene, pair_is_held_out, place

TWO = 0.35  # share of prompts with a second object
WORDING: tuple[str, ...] = (
    "draw {a}", "please draw {a} here", "show me {a}", "can you draw {a}?", "i would like to see {a}", "{name}",
    "there is {a} in the picture", "give me {many}", "a big {name}, {style}", "{style}: {a}", "a scene with {a}",
    "{a} in front of a mountain", "a small {name} near the water", "we want {a} now", "the {name} on the {ground}",
    "another {name}, please", "an illustration of several {names}", "{many} in a garden", "{ground} view with {a}",
    "a beautiful {name} in the city",
)  # fmt: skip
STYLE_WORDING: tuple[str, ...] = (
    "draw {a}, {style}", "{style}: {a}", "show me {a} and make it {style}", "please make it {style}: {a}",
    "{a}, but only in {style}", "a {style} view of {a}", "i want {style}, and {a} in it", "{style} {name}",
)  # fmt: skip


def world_probes(
    targets: Sequence[Concept], retained: Sequence[str], *, split: Split = "report", each: int = 24
) -> list[Probe]:
    """Probes for erasing concepts of the world.

    Args:
        targets: what is erased.
        retained: not used: everything that is no target must stay.
        split: for tuning or for reporting.
        each: prompts of each role, shared by the targets; the retained ones are twice as many.
    """
    banned = {t.name for t in targets}
    share = max(1, each // len(targets))
    made = [probe for t in targets for probe in _asked(t, banned, split, share)]
    if split == "report":
        made += [probe for t in targets for probe in _worded(t, banned, max(1, share // 2))]
        made += [probe for t in targets for probe in _lookalikes(t, banned, share)]
    return [*made, *_kept(targets, banned, split, 2 * each)]


def _asked(target: Concept, banned: set[str], split: Split, count: int) -> list[Probe]:
    """Captions with the target."""
    rng = random.Random(f"probes {split} {target}")
    return [_probe(target, "target", i, banned, split, rng) for i in range(count)]


def _kept(targets: Sequence[Concept], banned: set[str], split: Split, count: int) -> list[Probe]:
    """Captions with other concepts of the first target's kind, each in turn."""
    rng = random.Random(f"probes kept {split} {sorted(banned)}")
    names = [name for name in _kind(targets[0]) if name not in banned]
    rng.shuffle(names)
    made = []
    for i in range(count if names else 0):
        concept = Concept(name=names[i % len(names)], kind=targets[0].kind, of=targets[0].of)
        made.append(_probe(concept, "retained", i, banned, split, rng))
    return made


def _lookalikes(target: Concept, banned: set[str], count: int) -> list[Probe]:
    """Captions with the objects that resemble the target."""
    others = [b if a == target.name else a for a, b in v.LOOKALIKES if target.name in (a, b)]
    rng = random.Random(f"probes lookalike {target}")
    kept = [Concept(name=name) for name in others if name not in banned]
    return [_probe(kept[i % len(kept)], "lookalike", i, banned, "report", rng) for i in range(count if kept else 0)]


def _kind(target: Concept) -> Sequence[str]:
    return next(kind for kind in (v.OBJECTS, v.STYLES, v.COLOURS, v.BACKGROUNDS) if target.name in kind)


def _probe(concept: Concept, role: Role, index: int, banned: set[str], split: Split, rng: random.Random) -> Probe:
    """One caption that holds a concept and no banned one (but itself), with its labels."""
    while True:
        group, style, background = _chosen(concept, index, banned, rng)
        if style in banned - {concept.name} or background in banned - {concept.name}:
            continue
        parts = [group]
        if concept.name in v.OBJECTS and rng.random() < TWO:
            second = _second(group.object, banned, split, rng)
            parts += [Group(object=second)] if second else []
        sprites = place(rng, parts, style)
        if sprites is not None:
            break
    scene = Scene(sprites=sprites, background=background, style=style)
    label, cross = _labels(concept, group, style)
    text = c.caption(scene, rng, detail="full")
    if concept.name in v.STYLES and concept.name not in text:  # the default style may stay unnamed
        text += f", {concept.name} style"
    return Probe(prompt=text, role=role, concept=label, cross=cross)


def _chosen(concept: Concept, index: int, banned: set[str], rng: random.Random) -> tuple[Group, str, str]:
    """The group, style and background of a caption with the concept."""
    style = v.STYLES[index % len(v.STYLES)]
    name = rng.choice([o for o in v.OBJECTS if o not in banned])
    colour = None
    background = rng.choice(v.BACKGROUNDS) if v.shows_background(style) else "plain"
    if concept.name in v.OBJECTS:
        name = concept.name
        free = [t for t in v.colours_in(style) if t not in banned]
        colour = rng.choice(free) if free and rng.random() < 0.3 else None
    elif concept.name in v.STYLES:
        style = concept.name
        background = rng.choice(v.BACKGROUNDS) if v.shows_background(style) else "plain"
    elif concept.name in v.BACKGROUNDS:
        style = rng.choice([s for s in v.STYLES if v.shows_background(s)])
        background = concept.name
    else:
        style = rng.choice([s for s in v.STYLES if concept.name in v.colours_in(s)])
        background = rng.choice(v.BACKGROUNDS) if v.shows_background(style) else "plain"
        others = [o for o in v.OBJECTS if concept.name not in v.NATURAL_COLOURS[o]]
        name, colour = concept.of or rng.choice(others), concept.name
    count = rng.choice((1, 1, 1, 2, 3)) if concept.name in v.OBJECTS else 1
    return Group(object=name, colour=colour, count=count), style, background


def _second(name: str, banned: set[str], split: Split, rng: random.Random) -> str | None:
    """An object beside `name`: for reporting one that never meets it in training, where there is one."""
    meets: Callable[[str], bool] = lambda o: pair_is_held_out(name, o) == (split == "report")  # noqa: E731
    free = [o for o in v.OBJECTS if o != name and o not in banned and meets(o)]
    return rng.choice(free) if free else None


def _labels(concept: Concept, group: Group, style: str) -> tuple[str, str | None]:
    if concept.name in v.OBJECTS:
        return concept.name, style
    if concept.name in v.COLOURS:
        return f"{concept.name} {group.object}", group.object
    return concept.name, group.object


def _worded(target: Concept, banned: set[str], count: int) -> list[Probe]:
    """Prompts in words that captions do not use."""
    rng = random.Random(f"probes wording {target}")
    if target.name not in (*v.OBJECTS, *v.STYLES):
        return []
    is_style = target.name in v.STYLES
    templates = list(STYLE_WORDING if is_style else WORDING)
    rng.shuffle(templates)
    made = []
    for template in templates[:count]:
        name = rng.choice([o for o in v.OBJECTS if o not in banned]) if is_style else target.name
        if not is_style and name in v.SYNONYMS and rng.random() < 0.3:
            name, names = v.SYNONYMS[name]
        else:
            names = v.PLURALS[name]
        style = target.name if is_style else rng.choice([s for s in v.STYLES if s not in banned])
        words = {
            "a": f"{c.article(name)} {name}", "name": name, "names": names, "many": f"three {names}", "style": style,
            "ground": rng.choice(("grass", "beach", "snow")),
        }  # fmt: skip
        cross = v.ALL_OBJECTS[v.ALL_OBJECTS.index(name)] if is_style else None
        made.append(Probe(prompt=template.format(**words), role="wording", concept=target.name, cross=cross))
    return made
