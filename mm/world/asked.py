"""How many things of each kind a prompt asks for.

Design choices
- Only what the words say for certain: a plural without a number, a number beyond what a picture holds, or a negation
  gives None, and such a picture is not checked.
- A number counts for the next noun, with nothing but adjectives between the two, so that "a photo of two cats" asks for
  two. Two nouns in a row name one thing ("a pine tree").
"""

from __future__ import annotations

from mm.world import vocabulary as v
from mm.world.words import split

_NUMBERS = {"a": 1, "an": 1, "one": 1, "1": 1, "single": 1, "two": 2, "2": 2, "pair": 2, "three": 3, "3": 3}
_NUMBERS |= {"four": 4, "4": 4}
_UNCLEAR = frozenset(
    "another five six seven eight nine ten 5 6 7 8 9 10 several some few many no zero none without not".split()
)
_BETWEEN = frozenset("big small large tiny huge little bright dark light beautiful simple of natural".split())


def _nouns() -> dict[str, tuple[str, str]]:
    """Words to their object and their number: "one", "several", or "either"."""
    out = {name: (name, "one" if v.PLURALS[name] != name else "either") for name in v.ALL_OBJECTS}
    out |= {plural: (name, "several") for name, plural in v.PLURALS.items() if plural != name}
    for name, (one, several) in v.SYNONYMS.items():
        out |= {one: (name, "one"), several: (name, "several")}
    return out


_NOUNS = _nouns()


def asked_numbers(prompt: str) -> tuple[int, ...] | None:
    """The number of things in each group that `prompt` asks for, in the order of the words.

    Things of one kind in one colour are one group. None where the prompt does not say for certain: no known object, a
    plural without a number or a singular with one, a negation, more than a picture holds.
    """
    asked: dict[tuple[str, str | None], int] = {}
    number: int | None = None
    colour: str | None = None
    before: tuple[tuple[str, str | None], int] | None = None  # the group of the noun just before, and its number
    for word in split(prompt):
        if word in _UNCLEAR:
            return None
        if word in _NOUNS:
            name, form = _NOUNS[word]
            if before is not None:
                asked[before[0]] -= before[1]
                (_, colour), number = before
            count = 1 if number is None and form != "several" else number
            if count is None or (form == "one" and count > 1) or (form == "several" and count == 1):
                return None
            before = ((name, colour), count)
            asked[before[0]] = asked.get(before[0], 0) + count
            number = colour = None
            continue
        before = None
        if word in _NUMBERS:
            number, colour = _NUMBERS[word], None
        elif word in v.COLOURS:
            colour = word
        elif word not in _BETWEEN:
            number = colour = None
    counts = tuple(count for count in asked.values() if count)
    return counts if counts and max(counts) <= v.MAX_COUNT and sum(counts) <= v.MAX_SPRITES else None
