"""Scenes: what stands where, and the random sampler that makes them.

Design choices
- A scene is plain frozen data; pictures, captions, questions and the judge's truth all come from it.
- Sprites never overlap by more than a sliver, so that whatever is in a scene can be seen and counted.
- Relations follow GenEval's rule (Ghosh et al. 2023, arXiv 2310.11513): centre offset, shrunk by a tenth of the two
  sizes per axis, normalized; a component beyond one half names the relation.
- Some compositions (object pairs, object-colour, object-count) are held out of all training: `is_held_out`. They are
  picked by a hash of their names, so that the split needs no file and never drifts.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mm.world import vocabulary as v

SIZES: tuple[int, ...] = (28, 36, 44, 52, 60)
_SIZE_RANGE = {1: (44, 60), 2: (44, 52), 3: (36, 44), 4: (36, 44), 5: (28, 36), 6: (28, 28)}
# Sampled centres lie on a coarse grid and sizes are few: pictures are as varied, and a model has far fewer distinct
# latents to learn per object (4 offsets within a 16-pixel cell instead of 256).
GRID = 8
_MARGIN = 2  # pixels kept free at the picture's border
HELD_OUT_SHARE = 20  # one composition in twenty


@dataclass(frozen=True, kw_only=True, slots=True)
class Sprite:
    """One object: centre (x, y) in pixels, y down; `size` = longest side in pixels; `colour` None = natural."""

    object: str
    colour: str | None = None
    x: int
    y: int
    size: int

    def __post_init__(self) -> None:
        if self.object not in v.ALL_OBJECTS:
            raise ValueError(f"unknown object {self.object!r}; known: {', '.join(v.ALL_OBJECTS)}")
        if self.colour is not None and self.colour not in v.COLOURS:
            raise ValueError(f"unknown colour {self.colour!r}; known: {', '.join(v.COLOURS)}, or None for natural")
        if self.size not in SIZES:
            raise ValueError(f"sprite size {self.size} is not one of {SIZES}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Sprites over a background in a style."""

    sprites: tuple[Sprite, ...]
    background: str = "plain"
    style: str = v.DEFAULT_STYLE

    def __post_init__(self) -> None:
        if len(self.sprites) > v.MAX_SPRITES:
            raise ValueError(f"a scene holds at most {v.MAX_SPRITES} sprites, got {len(self.sprites)}")
        if self.background not in v.BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}; known: {', '.join(v.BACKGROUNDS)}")
        if self.style not in v.STYLES:
            raise ValueError(f"unknown style {self.style!r}; known: {', '.join(v.STYLES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Sprites of one object and colour, counted."""

    object: str
    colour: str | None = None
    count: int = 1


def groups(scene: Scene) -> tuple[Group, ...]:
    """The scene's groups in order of first appearance."""
    counts = Counter((s.object, s.colour) for s in scene.sprites)
    return tuple(Group(object=o, colour=c, count=n) for (o, c), n in counts.items())


def members(scene: Scene, group: Group) -> list[Sprite]:
    """The sprites that make up `group`."""
    return [s for s in scene.sprites if s.object == group.object and s.colour == group.colour]


def relation_of(dx: float, dy: float, size_a: float, size_b: float) -> frozenset[str]:
    """Relations of a to b by GenEval's rule from the offset (dx, dy) = centre_a - centre_b, y down."""
    shrink = 0.1 * (size_a + size_b)
    dx, dy = (math.copysign(max(abs(d) - shrink, 0.0), d) for d in (dx, dy))
    norm = math.hypot(dx, dy)
    if norm == 0:
        return frozenset()
    dx, dy = dx / norm, dy / norm
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, holds in named.items() if holds)


def relation(a: Sprite, b: Sprite) -> frozenset[str]:
    """Relations of sprite `a` to sprite `b` (see `relation_of`)."""
    return relation_of(a.x - b.x, a.y - b.y, a.size, b.size)


def group_relation(scene: Scene, a: Group, b: Group) -> frozenset[str]:
    """Relations that hold between every member of `a` and every member of `b`."""
    pairs = [relation(p, q) for p in members(scene, a) for q in members(scene, b)]
    return frozenset.intersection(*pairs) if pairs else frozenset()


def _in_held_out(*parts: object) -> bool:
    digest = hashlib.blake2s(" ".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def pair_is_held_out(a: str, b: str) -> bool:
    """Whether objects `a` and `b` never meet in training."""
    return _in_held_out("pair", *sorted((a, b)))


def colour_is_held_out(name: str, colour: str | None) -> bool:
    """Whether object `name` never appears in `colour` in training. Natural colours are never held out."""
    return colour is not None and colour not in v.NATURAL_COLOURS[name] and _in_held_out("colour", name, colour)


def count_is_held_out(name: str, count: int) -> bool:
    """Whether exactly `count` (two or more) of object `name` never appear in training."""
    return count > 1 and _in_held_out("count", name, count)


def is_held_out(parts: Sequence[Group]) -> bool:
    """Whether a scene made of these groups is kept for reporting and must not be trained on."""
    names = [g.object for g in parts]
    if any(pair_is_held_out(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a != b):
        return True
    return any(colour_is_held_out(g.object, g.colour) or count_is_held_out(g.object, g.count) for g in parts)


def _sample_groups(rng: random.Random, objects: Sequence[str], style: str, kind: str) -> tuple[Group, ...]:
    """One to three groups of a kind of scene (see `sample_scene`); colours only where the style shows them."""
    shares = {"free": (40, 48, 12), "pair": (0, 1, 0), "count": (1, 0, 0), "crowd": (0, 1, 1)}[kind]
    n_groups = rng.choices((1, 2, 3), shares)[0]
    numbers = {"free": ((4, 3, 3, 3), (6, 1, 1, 1), (6, 1, 1, 1))[n_groups - 1]}
    numbers |= {"pair": (1, 0, 0, 0), "count": (0, 1, 1, 1), "crowd": (1, 1, 1, 1)}
    limit = 4 if v.smallest_sprite(style) > SIZES[0] else v.MAX_SPRITES
    out: list[Group] = []
    for name in rng.sample(list(objects), n_groups):
        left = limit - sum(g.count for g in out) - (n_groups - len(out) - 1)
        count = min(rng.choices((1, 2, 3, 4), numbers[kind])[0], left)
        tints = v.colours_in(style)
        colour = rng.choice(tints) if tints and rng.random() < 0.6 else None
        out.append(Group(object=name, colour=colour, count=count))
    return tuple(out)


def place(rng: random.Random, parts: Sequence[Group], style: str, *, tries: int = 200) -> tuple[Sprite, ...] | None:
    """Random sizes and places for the groups' sprites without overlap; None when no place was found."""
    total = sum(g.count for g in parts)
    low, high = _SIZE_RANGE[total]
    low = max(low, v.smallest_sprite(style))
    choices = [s for s in SIZES if low <= s <= max(high, low)]
    placed: list[Sprite] = []
    for group in parts:
        size = rng.choice(choices)
        for _ in range(group.count):
            spot = _free_spot(rng, placed, size, tries)
            if spot is None:
                return None
            placed.append(Sprite(object=group.object, colour=group.colour, x=spot[0], y=spot[1], size=size))
    return tuple(placed)


def stops(size: int) -> range:
    """Grid coordinates at which a centred sprite of `size` stays inside the picture."""
    half = size // 2 + _MARGIN
    return range(-(-half // GRID) * GRID, v.SIZE - half + 1, GRID)


def is_free(placed: Sequence[Sprite], x: int, y: int, size: int) -> bool:
    """Whether a sprite of `size` centred at (x, y) would overlap none of `placed`."""
    return all(max(abs(x - s.x), abs(y - s.y)) >= (size + s.size) // 2 for s in placed)


def _free_spot(rng: random.Random, placed: Sequence[Sprite], size: int, tries: int) -> tuple[int, int] | None:
    for _ in range(tries):
        x, y = rng.choice(stops(size)), rng.choice(stops(size))
        if is_free(placed, x, y, size):
            return x, y
    return None


def add_sprite(scene: Scene, like: Sprite, rng: random.Random, *, tries: int = 200) -> Scene | None:
    """`scene` with one sprite more, like `like`, at a free place; None when it is full or no place was found."""
    if len(scene.sprites) == v.MAX_SPRITES:
        return None
    spot = _free_spot(rng, list(scene.sprites), like.size, tries)
    if spot is None:
        return None
    return replace(scene, sprites=(*scene.sprites, replace(like, x=spot[0], y=spot[1])))


def sample_scene(
    rng: random.Random,
    *,
    objects: Sequence[str] = v.OBJECTS,
    styles: Sequence[str] = v.STYLES,
    backgrounds: Sequence[str] = v.BACKGROUNDS,
    held_out: bool = False,
    default_weight: int = 3,
    pair_share: float = 0.0,
    count_share: float = 0.0,
    crowd_share: float = 0.0,
) -> Scene:
    """A random scene; with `held_out` False, never one whose composition is kept for reporting.

    The default style is drawn `default_weight` times as often as any other: it is what an unnamed style asks for.
    `pair_share` of the scenes hold two single objects, for relations and binding; `count_share` two
    to four of one object; `crowd_share` two or three groups of up to four each.
    """
    shares = {"pair": pair_share, "count": count_share, "crowd": crowd_share}
    shares["free"] = 1 - sum(shares.values())
    if min(shares.values()) < 0:
        raise ValueError(f"shares of scenes {shares} must lie in [0, 1] and add up to at most 1")
    while True:
        style = rng.choices(styles, [default_weight if s == v.DEFAULT_STYLE else 1 for s in styles])[0]
        # Without shares no random number is drawn here: evaluations are seeded without it.
        kind = "free" if shares["free"] == 1 else rng.choices(list(shares), list(shares.values()))[0]
        parts = _sample_groups(rng, objects, style, kind)
        if is_held_out(parts) != held_out:
            continue
        sprites = place(rng, parts, style)
        if sprites is not None:
            background = rng.choice(list(backgrounds)) if v.shows_background(style) else "plain"
            return Scene(sprites=sprites, background=background, style=style)
