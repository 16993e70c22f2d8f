"""Edits: a source scene, an instruction, and the target, which differs by the instruction and in nothing else.

Design choices
- Seven kinds: recolour, remove, add, replace, restyle, background, move. Each maker returns None where the scene has no
  space or no object for it, and the sampler draws another scene.
- Targets obey the same rules as sampled scenes: sizes, grid, no overlap, colours and grounds only where they show, and
  no composition that is held out.
- A recoloured object keeps its place, a replaced one its place and size: what the instruction does not name must not
  move.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm.world import vocabulary as v
from mm.world.captions import BACKGROUND_PHRASES, article, group_phrase
from mm.world.scene import (
    SIZES,
    Group,
    Scene,
    Sprite,
    group_relation,
    groups,
    is_free,
    is_held_out,
    members,
    sample_scene,
    stops,
)

KINDS: tuple[str, ...] = ("recolour", "remove", "add", "replace", "restyle", "background", "move")
# For training: what must find a place of its own is learned slowest, a background fastest.
TRAINING_WEIGHTS: tuple[int, ...] = (3, 2, 8, 3, 2, 2, 3)
Change = tuple[Scene, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """`source` becomes `target` by `instruction`."""

    kind: str
    source: Scene
    instruction: str
    target: Scene


def _the(group: Group) -> str:
    return f"the {v.plural(group.object, group.count)}"


def _one_of_its_kind(scene: Scene, rng: random.Random) -> Group | None:
    """A group that its object's name alone points to."""
    parts = groups(scene)
    clear = [g for g in parts if sum(o.object == g.object for o in parts) == 1]
    return rng.choice(clear) if clear else None


def _swap(scene: Scene, group: Group, **fields: Any) -> Scene:
    """The scene with `group`'s sprites changed."""
    chosen = members(scene, group)
    sprites = tuple(dataclasses.replace(s, **fields) if s in chosen else s for s in scene.sprites)
    return dataclasses.replace(scene, sprites=sprites)


def _recolour(scene: Scene, rng: random.Random) -> Change | None:
    group = _one_of_its_kind(scene, rng)
    tints = [c for c in v.colours_in(scene.style) if group and not v.counts_as(group.object, group.colour, c)]
    if group is None or not tints:
        return None
    colour = rng.choice(tints)
    wording = rng.choice(("make {} {}", "turn {} {}", "paint {} {}", "change the colour of {} to {}"))
    return _swap(scene, group, colour=colour), wording.format(_the(group), colour)


def _remove(scene: Scene, rng: random.Random) -> Change | None:
    group = _one_of_its_kind(scene, rng)
    if group is None or len(groups(scene)) < 2:
        return None
    left = tuple(s for s in scene.sprites if s.object != group.object)
    wording = rng.choice(("remove {}", "delete {}", "erase {}", "take {} away"))
    return dataclasses.replace(scene, sprites=left), wording.format(_the(group))


def _add(scene: Scene, rng: random.Random) -> Change | None:
    limit = v.MAX_SPRITES if v.smallest_sprite(scene.style) == SIZES[0] else v.MAX_COUNT
    if len(scene.sprites) >= limit:
        return None
    name = rng.choice([o for o in v.OBJECTS if o not in {s.object for s in scene.sprites}])
    tints = v.colours_in(scene.style)
    colour = rng.choice(tints) if tints and rng.random() < 0.5 else None
    size = rng.choice([s for s in SIZES if v.smallest_sprite(scene.style) <= s <= 52])
    spots = [(x, y) for x in stops(size) for y in stops(size) if is_free(scene.sprites, x, y, size)]
    rng.shuffle(spots)
    anchor = _one_of_its_kind(scene, rng)
    new = Group(object=name, colour=colour)
    phrase = group_phrase(new, rng, plain=True)
    for x, y in spots[:40]:
        sprite = Sprite(object=name, colour=colour, x=x, y=y, size=size)
        target = dataclasses.replace(scene, sprites=(*scene.sprites, sprite))
        held = sorted(group_relation(target, new, anchor)) if anchor and anchor.count == 1 else []
        if anchor is None or anchor.count > 1:
            return target, rng.choice(("add {}", "put {} here", "draw {} in the picture")).format(phrase)
        if held:
            where = f"{rng.choice(held)} the {anchor.object}"
            return target, rng.choice(("add {} {}", "put {} {}", "draw {} {}")).format(phrase, where)
    return None


def _replace(scene: Scene, rng: random.Random) -> Change | None:
    group = _one_of_its_kind(scene, rng)
    if group is None:
        return None
    name = rng.choice([o for o in v.OBJECTS if o not in {s.object for s in scene.sprites}])
    new = Group(object=name, colour=group.colour, count=group.count)
    phrase = f"{article(name)} {name}" if group.count == 1 else v.PLURALS[name]
    if group.colour is not None:
        phrase = group_phrase(new, rng, plain=True) if group.count == 1 else f"{group.colour} {v.PLURALS[name]}"
    wording = rng.choice(("replace {} with {}", "turn {} into {}", "swap {} for {}", "change {} into {}"))
    return _swap(scene, group, object=name), wording.format(_the(group), phrase)


def _restyle(scene: Scene, rng: random.Random) -> Change | None:
    smallest = min(s.size for s in scene.sprites)
    tints = {s.colour for s in scene.sprites} - {None}
    fitting = [
        style
        for style in v.STYLES
        if style != scene.style
        and v.smallest_sprite(style) <= smallest
        and (not v.shows_colour(style) or tints <= set(v.colours_in(style)))
        # What the source does not show cannot be kept; a style that shows less drops it.
        and (v.shows_background(scene.style) or not v.shows_background(style) or scene.background == "plain")
    ]
    if not fitting:
        return None
    style = rng.choice(fitting)
    ground = scene.background if v.shows_background(style) else "plain"
    sprites = scene.sprites if v.shows_colour(style) else tuple(_tintless(s) for s in scene.sprites)
    wording = rng.choice(("make it {} style", "change the style to {}", "turn it into {} style", "in {} style"))
    return dataclasses.replace(scene, style=style, background=ground, sprites=sprites), wording.format(style)


def _tintless(sprite: Sprite) -> Sprite:
    return dataclasses.replace(sprite, colour=None)


def _background(scene: Scene, rng: random.Random) -> Change | None:
    if not v.shows_background(scene.style):
        return None
    ground = rng.choice([b for b in v.BACKGROUNDS if b != scene.background])
    wording = rng.choice(("change the background to {}", "make the background {}", "set the background to {}"))
    text = wording.format(ground)
    if rng.random() < 0.4:
        text = f"put it {BACKGROUND_PHRASES[ground][0]}"
    return dataclasses.replace(scene, background=ground), text


def _move(scene: Scene, rng: random.Random) -> Change | None:
    group = _one_of_its_kind(scene, rng)
    if group is None or group.count > 1:
        return None
    sprite = members(scene, group)[0]
    rest = tuple(s for s in scene.sprites if s is not sprite)
    side = rng.choice(("left", "right", "top", "bottom"))
    axis = "x" if side in ("left", "right") else "y"
    ends = [s for s in stops(sprite.size) if (s < 52 if side in ("left", "top") else s > 76)]
    now = getattr(sprite, axis)
    way = -1 if side in ("left", "top") else 1
    far = [e for e in ends if (e - now) * way >= 32]  # a sprite that stands there already has nowhere to go
    moves = [dataclasses.replace(sprite, x=end) if axis == "x" else dataclasses.replace(sprite, y=end) for end in far]
    moves = [m for m in moves if is_free(rest, m.x, m.y, m.size)]
    if not moves:
        return None
    moved = rng.choice(moves)
    wording = rng.choice(("move {} to the {}", "put {} on the {}", "shift {} to the {}"))
    sprites = tuple(moved if s is sprite else s for s in scene.sprites)
    return dataclasses.replace(scene, sprites=sprites), wording.format(_the(group), side)


_MAKERS: dict[str, Callable[[Scene, random.Random], Change | None]] = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "restyle": _restyle,
    "background": _background,
    "move": _move,
}


def edit_scene(source: Scene, rng: random.Random, kind: str) -> Edit | None:
    """A random edit of `source` of this kind, or None where the scene has no space or object for it."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of edit {kind!r}; known: {', '.join(KINDS)}")
    change = _MAKERS[kind](source, rng)
    return None if change is None else Edit(kind=kind, source=source, target=change[0], instruction=change[1])


def sample_edit(rng: random.Random, kind: str | None = None, *, held_out: bool = False) -> Edit:
    """A random edit of a random scene; with `held_out` False neither scene's composition is kept for reporting."""
    chosen = rng.choice(KINDS) if kind is None else kind
    while True:
        edit = edit_scene(sample_scene(rng, held_out=held_out), rng, chosen)
        if edit is not None and (held_out or not is_held_out(groups(edit.target))):
            return edit
