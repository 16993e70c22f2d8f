"""What a prompt in known words asks for that one picture cannot hold or show: kinds, numbers, colours and places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.demand import demand_of, in_order
from mm.world.demand_symbols import NUMBERS
from mm.world.demand_symbols import nouns as all_nouns
from mm.world.lexicon_phrases import backgrounds
from mm.world.words import split

SIDES = 'a place in the picture cannot be asked for; positions are between two things, as in "a cat left of a dog"'
UNREAD = (
    'the words are not understood in full, so the picture may lack some; write it as in "two red cats left of a dog on '
    'grass, watercolor style"'
)
MAX_KINDS = 3  # groups of things in a scene
_ARTICLES = ("a", "an", "the")


def ordered(words: list[str]) -> tuple[list[str], list[str]]:
    """Words in the order that the models were trained with, and a line for what is not read of them."""
    demand = demand_of(words)
    lines = [UNREAD] if demand is None and not _explained(words) else []
    return in_order(words), [SIDES] if demand is not None and demand.lone_side else lines


def _explained(words: list[str]) -> bool:
    """Whether `problems_of` says why words are not read: a thing in a thing, a crowd, a colour without a thing."""
    table = {word: name for word, (name, _) in all_nouns().items()}
    return any(True for _ in problems_of(words, table))


def problems_of(words: list[str], nouns: Mapping[str, str]) -> Iterator[str]:
    """A line for each thing that no picture can hold or show.

    Args:
        words: Of a prompt, in the models' own words.
        nouns: Words for things of the world, with the object's name.
    """
    kinds = list(dict.fromkeys(nouns[word] for word in words if word in nouns))
    if len(kinds) > MAX_KINDS:
        yield (
            f"a picture holds at most three kinds of things, and {len(kinds)} are named ({', '.join(kinds)}); some "
            "will be missing"
        )
    style = _style(words)
    total, limit = _total(words, nouns), v.MAX_SPRITES if v.smallest_sprite(style) < 44 else v.MAX_COUNT
    if total > limit and len(kinds) <= MAX_KINDS:
        yield f"a picture in {style} style holds at most {limit} things, and {total} are named; some will be missing"
    yield from _inside(words, nouns)
    yield from _grounds(words)
    yield from _hidden(words, nouns, style)
    yield from _fruit(words, nouns)


def _style(words: list[str]) -> str:
    """The style that a prompt names, or the default."""
    for style in v.STYLES:
        for phrase in (style, *c.STYLE_BEFORE[style]):
            parts = split(phrase)
            if style != v.DEFAULT_STYLE and any(words[i : i + len(parts)] == parts for i in range(len(words))):
                return style
    return v.DEFAULT_STYLE


def _total(words: list[str], nouns: Mapping[str, str]) -> int:
    """How many things are named. Two nouns in a row are one thing."""
    total, number = 0, 1
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if NUMBERS.get(word):
            number = NUMBERS[word]
        elif word in nouns and after not in nouns:
            total, number = total + number, 1
    return total


def _inside(words: list[str], nouns: Mapping[str, str]) -> Iterator[str]:
    """Things inside other things: "in a house"."""
    for at, word in enumerate(words):
        end = at + 1
        while end < len(words) and (words[end] in _ARTICLES or words[end] in v.COLOURS):
            end += 1
        if word == "in" and end < len(words) and words[end] in nouns:
            place = " ".join(words[at : end + 1])
            yield f"nothing is drawn inside other things; {place!r} is not understood as a place"


def _grounds(words: list[str]) -> Iterator[str]:
    """Backgrounds in a colour: "a red background"."""
    for colour, word in pairwise(words):
        if colour in v.COLOURS and word in ("background", "sky", "grass", "snow", "sea", "beach", "night", "sand"):
            if (colour, word) != ("blue", "sky"):
                yield f"backgrounds have no colours, so {f'{colour} {word}'!r} is not drawn; {', '.join(v.BACKGROUNDS)}"


def _hidden(words: list[str], nouns: Mapping[str, str], style: str) -> Iterator[str]:
    """Colours and backgrounds that a style does not show."""
    for word, after in pairwise(words):
        if word in v.COLOURS and after in nouns and word not in v.colours_in(style):
            yield f"{style} style does not show the colour {word!r}"
    if not v.shows_background(style):
        text = " ".join(words)
        for phrase in sorted(" ".join(p) for p in backgrounds()):
            if f" {phrase} " in f" {text} " and phrase not in c.BACKGROUND_PHRASES["plain"]:
                yield f"{style} style shows no background, so {phrase!r} is not drawn"


def _fruit(words: list[str], nouns: Mapping[str, str]) -> Iterator[str]:
    """The fruit: a colour that no thing follows."""
    for before, word, after in zip(words, words[1:], [*words[2:], "."], strict=False):
        ends = after in ("and", "with", "on", "in") or not after.isalpha()
        if word == "orange" and before in (*_ARTICLES, "one") and ends and after not in nouns:
            yield "the model knows 'orange' as a colour only; nearest things: apple, tomato, banana"
