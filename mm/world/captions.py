"""Captions: a small grammar with paraphrases over scenes.

Design choices
- A full caption names everything that can be seen: counts, tints, objects, relation, background and style. A partial
  one leaves out the background, the relation or a natural colour; never a count, a tint or a style other than cartoon,
  since leaving those out asks for something else (one, natural, cartoon).
- What the style cannot show is not said (`vocabulary.shows_colour`, `shows_background`).
- Every phrase is built of the words in `mm.world.words`; a test generates thousands and checks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from mm.world import vocabulary as v
from mm.world.scene import Group, Scene, group_relation, groups

Detail = Literal["full", "partial", "plain"]

COUNT_WORDS: dict[int, tuple[str, ...]] = {
    1: ("a", "one", "a single"),
    2: ("two", "2", "a pair of"),
    3: ("three", "3"),
    4: ("four", "4"),
}
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "sky": ("in the sky", "in a blue sky", "against the sky", "among the clouds"),
    "night": ("at night", "in the night", "in the dark", "under a night sky"),
    "grass": ("on grass", "on the grass", "in a meadow", "on a green field"),
    "beach": ("on the beach", "on a beach", "by the sea", "on the sand"),
    "snow": ("in the snow", "on snow", "in a snowy landscape", "on a winter day"),
    "plain": ("on a plain background", "on plain paper", "with a plain background"),
}
STYLE_BEFORE: dict[str, tuple[str, ...]] = {
    "cartoon": ("a cartoon of", "a picture of", "an image of", "a drawing of", "a photo of"),
    "pixel art": ("pixel art of", "a pixel art picture of", "an 8-bit picture of"),
    "watercolor": ("a watercolor painting of", "a watercolor of", "watercolor of"),
    "sketch": ("a sketch of", "a pencil sketch of", "a pencil drawing of"),
    "neon": ("a neon sign of", "neon lights of", "a glowing neon picture of"),
    "mosaic": ("a mosaic of", "a tile mosaic of"),
    "blueprint": ("a blueprint of", "a technical drawing of"),
    "sepia": ("a sepia picture of", "an old sepia photo of"),
}
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
_VOWELS = tuple("aeiou8")


def article(word: str) -> str:
    """a or an."""
    return "an" if word.startswith(_VOWELS) else "a"


def style_after(style: str, rng: random.Random) -> str:
    """A trailing style phrase."""
    return rng.choice((f", {style} style", f" in {style} style", f", {style}"))


def group_phrase(group: Group, rng: random.Random, *, plain: bool = False) -> str:
    """ "two red cats"; `plain` takes the first wording of each choice."""
    nouns = [(group.object, v.PLURALS[group.object])]
    if group.object in v.SYNONYMS and not plain and rng.random() < 0.12:
        nouns = [v.SYNONYMS[group.object]]
    noun = nouns[0][group.count > 1]
    rest = noun if group.colour is None else f"{group.colour} {noun}"
    words = COUNT_WORDS[group.count]
    # The first wording is used more than half of the time: it is also what people type.
    count = words[0] if plain or rng.random() < 0.6 else rng.choice(words)
    return f"{article(rest)} {rest}" if count == "a" else f"{count} {rest}"


def _named(group: Group, scene: Scene, rng: random.Random) -> Group:
    """The group with a natural colour spelled out now and then."""
    natural = [c for c in v.NATURAL_COLOURS[group.object] if c in v.colours_in(scene.style)]
    if group.colour is None and natural and rng.random() < 0.3:
        return Group(object=group.object, colour=rng.choice(natural), count=group.count)
    return group


def _related(scene: Scene, parts: Sequence[Group], rng: random.Random, plain: bool) -> str | None:
    """ "a cat left of a dog" for the two groups in order; None when no relation holds."""
    a, b = parts
    holds = group_relation(scene, a, b)
    held = [r for r in v.RELATIONS if r in holds]
    if not held:
        return None
    words = RELATION_PHRASES[held[0] if plain else rng.choice(held)]
    link = words[0] if plain else rng.choice(words)
    first, second = (_phrase(scene, g, rng, plain) for g in (a, b))
    return f"{first} {link} {second}"


def _phrase(scene: Scene, group: Group, rng: random.Random, plain: bool) -> str:
    return group_phrase(group if plain else _named(group, scene, rng), rng, plain=plain)


def _listed(scene: Scene, parts: Sequence[Group], rng: random.Random, plain: bool) -> str:
    phrases = [_phrase(scene, g, rng, plain) for g in parts]
    if len(phrases) == 2 and not plain and rng.random() < 0.3:
        return f"{phrases[0]} {rng.choice(('with', 'next to', 'beside'))} {phrases[1]}"
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def caption(scene: Scene, rng: random.Random, *, detail: Detail = "full") -> str:
    """A caption of `scene`.

    `full` names all that shows, `partial` leaves some of it out. `plain` is full in the first wording of each choice,
    groups in the vocabulary's order and natural colours left out, so that a scene has one such caption and a model
    need not guess between several.
    """
    plain = detail == "plain"
    parts = list(groups(scene))
    if plain:
        parts.sort(key=lambda g: (v.ALL_OBJECTS.index(g.object), g.colour or "", g.count))
    else:
        rng.shuffle(parts)
    keep = 1.0 if detail != "partial" else 0.5
    body = None
    if len(parts) == 2 and rng.random() < 0.85 * keep + (0.15 if plain else 0.0):
        body = _related(scene, parts, rng, plain)
    body = body or _listed(scene, parts, rng, plain)
    if v.shows_background(scene.style) and rng.random() < keep:
        phrases = BACKGROUND_PHRASES[scene.background]
        body += " " + (phrases[0] if plain or rng.random() < 0.5 else rng.choice(phrases))
    unnamed = scene.style == v.DEFAULT_STYLE and not (detail == "full" and rng.random() < 0.3)
    if unnamed:
        return f"{rng.choice(STYLE_BEFORE['cartoon'][1:])} {body}" if not plain and rng.random() < 0.3 else body
    if plain or rng.random() < 0.6:
        return body + (f", {scene.style} style" if plain else style_after(scene.style, rng))
    return f"{rng.choice(STYLE_BEFORE[scene.style])} {body}"
