"""The closed vocabulary of the procedural world: what can be drawn, named and asked.

Design choices
- One list per kind, in a fixed order: models and the judge index into these tuples, so it is part of the file format.
- `cartoon` is the default style and natural colour the default tint: both may stay unnamed in a prompt.
- What a picture cannot show is never said: `shows_colour` and `shows_background` say which styles keep hue and ground.
- A tint equal to an object's natural colour counts as both (`NATURAL_COLOURS`), by eye on the shipped sprites.
"""

from __future__ import annotations

SIZE = 128  # pixels, both sides
CELL = 16  # pixels a latent cell covers: the tokenizers are f16
MAX_SPRITES = 6
MAX_COUNT = 4

OBJECTS: tuple[str, ...] = (
    *("cat", "tiger", "dog", "wolf", "fox", "bear", "rabbit", "frog", "owl", "penguin"),
    *("bird", "fish", "dolphin", "turtle", "butterfly", "apple", "tomato", "banana", "pizza", "cake"),
    *("donut", "mushroom", "car", "bus", "bicycle", "boat", "rocket", "house", "castle", "guitar"),
    *("violin", "crown", "umbrella", "clock", "key", "tree", "pine", "sunflower", "star", "moon"),
)
# Kept out of all training of the generator, so that customization has something new to learn. The judge reads them.
HELD_OUT_OBJECTS: tuple[str, ...] = ("panda", "robot", "gift", "basketball", "tulip", "cactus", "heart", "balloon")
ALL_OBJECTS: tuple[str, ...] = OBJECTS + HELD_OUT_OBJECTS
# Words for many kinds of objects at once, asked by number: "how many animals are there?"
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": (*OBJECTS[:15], "panda"),
    "vehicles": ("car", "bus", "bicycle", "boat", "rocket"),
    "things": ALL_OBJECTS,
}

PLURALS: dict[str, str] = {name: name + "s" for name in ALL_OBJECTS} | {
    "wolf": "wolves",
    "fox": "foxes",
    "fish": "fish",
    "butterfly": "butterflies",
    "tomato": "tomatoes",
    "bus": "buses",
    "cactus": "cacti",
}
# A second word for the same object, used now and then in captions.
SYNONYMS: dict[str, tuple[str, str]] = {
    "cat": ("kitten", "kittens"),
    "dog": ("puppy", "puppies"),
    "rabbit": ("bunny", "bunnies"),
    "bicycle": ("bike", "bikes"),
    "boat": ("sailboat", "sailboats"),
    "violin": ("fiddle", "fiddles"),
    "donut": ("doughnut", "doughnuts"),
    "castle": ("fortress", "fortresses"),
}
LOOKALIKES: tuple[tuple[str, str], ...] = (
    ("cat", "tiger"),
    ("dog", "bear"),
    ("wolf", "fox"),
    ("apple", "tomato"),
    ("guitar", "violin"),
    ("tree", "pine"),
    ("house", "castle"),
    ("car", "bus"),
    ("fish", "dolphin"),
)

COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
COLOUR_RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.10, 0.12),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.98, 0.85, 0.10),
    "green": (0.16, 0.66, 0.22),
    "blue": (0.12, 0.36, 0.90),
    "purple": (0.52, 0.18, 0.74),
    "pink": (1.00, 0.50, 0.72),
    "brown": (0.46, 0.27, 0.12),
}
NATURAL_COLOURS: dict[str, tuple[str, ...]] = dict.fromkeys(ALL_OBJECTS, ()) | {
    "cat": ("orange", "yellow"),
    "tiger": ("orange",),
    "fox": ("orange", "red"),
    "bear": ("brown",),
    "frog": ("green",),
    "owl": ("brown",),
    "bird": ("blue",),
    "fish": ("blue",),
    "dolphin": ("blue",),
    "turtle": ("green",),
    "butterfly": ("orange",),
    "apple": ("red",),
    "tomato": ("red",),
    "banana": ("yellow",),
    "pizza": ("orange", "yellow"),
    "cake": ("orange",),
    "donut": ("brown",),
    "mushroom": ("red",),
    "car": ("red",),
    "bicycle": ("blue",),
    "boat": ("orange", "red"),
    "guitar": ("red",),
    "violin": ("red", "orange", "brown"),
    "crown": ("yellow", "orange"),
    "umbrella": ("purple", "blue"),
    "clock": ("blue",),
    "key": ("yellow",),
    "tree": ("green",),
    "pine": ("green",),
    "sunflower": ("yellow", "orange"),
    "star": ("yellow",),
    "moon": ("yellow",),
    "gift": ("yellow", "orange"),
    "basketball": ("orange",),
    "tulip": ("pink",),
    "cactus": ("green",),
    "heart": ("red",),
    "balloon": ("red",),
}

BACKGROUNDS: tuple[str, ...] = ("sky", "night", "grass", "beach", "snow", "plain")
STYLES: tuple[str, ...] = ("cartoon", "pixel art", "watercolor", "sketch", "neon", "mosaic", "blueprint", "sepia")
DEFAULT_STYLE = STYLES[0]
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_HUELESS = frozenset({"sketch", "blueprint", "sepia"})
_GROUNDLESS = frozenset({"sketch", "blueprint", "neon"})
# Styles built of 4-pixel tiles cannot show a small object: below 11 tiles across, similar objects are the same.
_TILED = frozenset({"pixel art", "mosaic"})


def shows_colour(style: str) -> bool:
    """Whether tints survive `style`, so that colours may be named and asked."""
    return style not in _HUELESS


def colours_in(style: str) -> tuple[str, ...]:
    """The tints that can be distinguished in `style`: none without hue; in neon, brown is the same as orange."""
    if not shows_colour(style):
        return ()
    return tuple(c for c in COLOURS if not (style == "neon" and c == "brown"))


def shows_background(style: str) -> bool:
    """Whether the background survives `style`, so that it may be named and asked."""
    return style not in _GROUNDLESS


def smallest_sprite(style: str) -> int:
    """Smallest size in pixels (longest side) at which every object can be recognized in `style`."""
    return 44 if style in _TILED else 28


def plural(name: str, count: int) -> str:
    """`name` as it is written after `count`."""
    return name if count == 1 else PLURALS[name]


def counts_as(name: str, tint: str | None, colour: str | None) -> bool:
    """Whether an object `name` drawn in `tint` (None = natural) answers to `colour` (None = natural)."""
    if tint == colour:
        return True
    natural = NATURAL_COLOURS[name]
    return (tint is None and colour in natural) or (colour is None and tint in natural)
