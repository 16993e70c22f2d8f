"""What a question asks for, apart from its wording."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mm.world import vocabulary as v

# Words for several kinds of objects. The first three are those that the model was trained to count.
CATEGORIES: dict[str, tuple[str, ...]] = v.CATEGORIES | {
    "fruits": ("apple", "banana"),
    "instruments": ("guitar", "violin"),
    "buildings": ("house", "castle"),
    "plants": ("tree", "pine", "sunflower", "mushroom"),
    "foods": ("apple", "tomato", "banana", "pizza", "cake", "donut", "mushroom"),
}
KINDS = (
    *("describe", "list", "exist", "count", "colour", "is colour", "which colour", "colours", "same colour"),
    *(
        "position",
        "which",
        "which relation",
        "where",
        "style",
        "is style",
        "background",
        "is ground",
        "time",
        "compare",
        "most",
    ),
)
Kind = str
Bound = Literal["exactly", "at least", "at most", "more than", "fewer than"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """A noun phrase of a question.

    Args:
        name: An object, a category of `CATEGORIES`, or a name that the model was given later ("<mug>").
        colour: The colour that the phrase names.
        count: The number that the phrase names.
        bound: How the number is meant.
        plural: Whether the noun is a plural.
        negated: "no cat".
    """

    name: str
    colour: str | None = None
    count: int | None = None
    bound: Bound = "exactly"
    plural: bool = False
    negated: bool = False

    @property
    def objects(self) -> tuple[str, ...]:
        """The kinds of objects that it stands for."""
        return CATEGORIES.get(self.name, (self.name,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A question as a structure.

    Args:
        kind: One of `KINDS`.
        things: What it is about; empty where it says "it" or "they", or asks about the whole picture.
        value: A detail of the kind: a colour, style, background or the sign of a comparison ("more", "fewer", "same").
        relation: One of `vocabulary.RELATIONS`; "count" where a number of coloured things is asked for.
        ground: A background that is also asked for ("are there cats on the grass?").
        join: How several things are meant: all of them, any of them, or none.
        negated: The question asks whether it is not so.
        explicit: Yes and no alone would be ambiguous, since the question holds a negation.
        trained: The wording is one that the model was trained on; it is asked as it is.
    """

    kind: Kind
    things: tuple[Thing, ...] = ()
    value: str = ""
    relation: str = ""
    ground: str = ""
    join: Literal["all", "any", "none", "either"] = "all"
    negated: bool = False
    explicit: bool = False
    trained: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of question {self.kind!r}; known: {', '.join(KINDS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Unread:
    """A question that was not understood: `word` is the first unknown word, and `thing` whether it is a noun."""

    word: str | None = None
    thing: bool = False
