"""The first pass over a prompt in known words: phrases and noun phrases as symbols (`mm.world.demand` reads these).

Symbols: N thing, I pronoun, # number without a noun, C colour, S style, H word that goes with one style, G background,
R relation, E side of the picture, P preposition, J join, O opener.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.words import split

Phrase = tuple[str, ...]
ARTICLES = ("a", "an", "the")
# The number that a word before a noun says; 0 for articles.
NUMBERS = dict.fromkeys(ARTICLES, 0) | {"one": 1, "1": 1, "single": 1, "pair": 2, "two": 2, "2": 2, "three": 3, "3": 3}
NUMBERS |= {"four": 4, "4": 4}
_SPOKEN = frozenset(word for word, number in NUMBERS.items() if number)
_SIDES = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
_PLACING = ("in", "on", "at", "by", "under", "against", "among", "with", "over", "across", "of", "from")
_JOINS = frozenset({"and", "with", ",", ";", ":", ".", "!", "?", "-", "(", ")"})
# Words that may stand apart from the phrase of their style ("fish, tile, mosaic").
_STYLE_WORDS = {"glowing": "neon", "lights": "neon", "sign": "neon", "painting": "watercolor", "technical": "blueprint"}
_STYLE_WORDS |= {"old": "sepia", "pencil": "sketch", "tile": "mosaic", "retro": "pixel art", "pixel": "pixel art"}
_WITHOUT_MEANING = frozenset({"of", "background", "style", "art", "landscape"})


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A noun phrase.

    Attributes:
        name: Of the object.
        plural: Whether the word is a plural; None for one that is the same in both numbers.
        count: None where no number and no article is said.
        colour: Before the noun.
        definite: Whether "the" stands before it.
    """

    name: str
    plural: bool | None
    count: int | None
    colour: str | None
    definite: bool


@dataclass(frozen=True, kw_only=True)
class Symbol:
    """A phrase: its kind (see above), what it names, and the thing of an N."""

    kind: str
    name: str = ""
    thing: Thing | None = None


def symbols_of(words: Sequence[str]) -> list[Symbol] | None:
    """The words as symbols; None where one is not known, or a noun does not fit its number."""
    out: list[Symbol] = []
    at = 0
    while at < len(words):
        hit, length = _phrase_at(words, at)
        if hit is not None:
            out.append(Symbol(kind=hit[0], name=hit[1]))
            at += length
            continue
        thing, length = _thing_at(words, at)
        word = words[at]
        if thing is not None:
            out.append(Symbol(kind="N", thing=thing))
        elif word in v.COLOURS and at and words[at - 1] in ("a", "an", *_SPOKEN):
            return None  # "an orange and a pine": a colour is no thing
        elif word in v.COLOURS:
            out.append(Symbol(kind="C", name=word))
        elif word in ("it", "them"):
            out.append(Symbol(kind="I"))
        elif NUMBERS.get(word):
            out.append(Symbol(kind="#", name=str(NUMBERS[word])))
        elif word in _STYLE_WORDS:
            out.append(Symbol(kind="H", name=_STYLE_WORDS[word]))
        elif word in _JOINS:
            out.append(Symbol(kind="J", name=word))
        elif word in ("on", "by", "at", "in"):
            out.append(Symbol(kind="P", name=word))
        elif word not in _WITHOUT_MEANING and word not in ARTICLES:
            return None
        at += max(length, 1)
    return out


@cache
def nouns() -> dict[str, tuple[str, bool | None]]:
    """Words to the object that they name, and whether each is a plural; None where it is the same in both numbers."""
    out: dict[str, tuple[str, bool | None]] = {}
    pairs = [(name, (name, v.PLURALS[name])) for name in v.ALL_OBJECTS] + list(v.SYNONYMS.items())
    for name, (one, several) in pairs:
        out |= {one: (name, False), several: (name, True)} if one != several else {one: (name, None)}
    return out


@cache
def _phrases() -> dict[Phrase, tuple[str, str]]:
    """Phrases with their symbol and what they name."""
    out = {phrase: ("S", style) for style in v.STYLES for phrase in _style_phrases(style)}
    openers = [p.removesuffix(" of") for p in c.STYLE_BEFORE[v.DEFAULT_STYLE][1:]]
    openers += [opener.split()[-1] for opener in openers]
    out |= {tuple(split(opener + end)): ("O", "") for opener in openers for end in ("", " of")}
    out |= {phrase: ("G", ground) for ground in v.BACKGROUNDS for phrase in _ground_phrases(ground)}
    out |= dict.fromkeys((("winter",), ("snowy",)), ("G", "snow"))
    out |= {tuple(split(p)): ("R", name) for name, choices in c.RELATION_PHRASES.items() for p in choices}
    begins = [(*placing, *article) for placing in ((), ("on",), ("to",), ("at",)) for article in ((), ("the",))]
    for word, name in _SIDES.items():
        out |= {(*begin, word, *side): ("E", name) for begin in begins for side in ((), ("side",))}
    return out | {
        ("next", "to"): ("J", "next to"),
        ("beside",): ("J", "beside"),
        ("in", "the", "background"): ("O", ""),
    }


def _style_phrases(style: str) -> Iterator[Phrase]:
    forms = [style, f"{style} style", f"in {style} style", f"in {style}", f"in a {style} style", f"as {style}"]
    forms += [f"in the style of {style}", f"in the style of a {style}"]
    forms += ["8-bit"] if style == "pixel art" else []
    for phrase in c.STYLE_BEFORE[style][: 1 if style == v.DEFAULT_STYLE else None]:
        core = phrase.removeprefix("a ").removeprefix("an ").removesuffix(" of")
        forms += [phrase, core, f"a {core}", f"an {core}", f"{core} of", f"in {core}"]
    yield from (tuple(split(form)) for form in forms)


def _ground_phrases(ground: str) -> Iterator[Phrase]:
    """The words for a background with any preposition and article, or none."""
    for phrase in c.BACKGROUND_PHRASES[ground]:
        words = split(phrase)
        while words[0] in (*_PLACING, *ARTICLES):
            words = words[1:]
        for placing in ((), *((word,) for word in _PLACING)):
            yield from ((*placing, *article, *words) for article in ((), ("a",), ("the",)))


@cache
def _longest() -> int:
    return max(map(len, _phrases()))


def _phrase_at(words: Sequence[str], at: int) -> tuple[tuple[str, str] | None, int]:
    """The longest phrase that begins at a position, and its length."""
    for length in range(min(_longest(), len(words) - at), 0, -1):
        hit = _phrases().get(tuple(words[at : at + length]))
        if hit is not None and not (hit[0] == "G" and _is_trait(words, at, length)):
            return hit, length
    return None, 0


def _is_trait(words: Sequence[str], at: int, length: int) -> bool:
    """Whether the name of a background stands before a noun, as in "a plain house" or "a snow fox"."""
    after = words[at + length] if at + length < len(words) else ""
    return words[at] not in _PLACING and (after in nouns() or after in v.COLOURS)


def _thing_at(words: Sequence[str], at: int) -> tuple[Thing | None, int]:
    """The noun phrase that begins at a position, and its length."""
    start, count, article = at, None, ""
    while at < len(words) and (
        words[at] in NUMBERS or (words[at] == "of" and at > start and words[at - 1] not in ARTICLES)
    ):
        if words[at] in ARTICLES:
            article = words[at]
        elif words[at] != "of" and count is None:
            count = NUMBERS[words[at]] or None
        elif words[at] != "of" and NUMBERS[words[at]] != count:  # "one single" is one
            return None, 1
        at += 1
    colour = words[at] if at < len(words) and words[at] in v.COLOURS else None
    at += colour is not None
    if at >= len(words) or words[at] not in nouns():
        return None, 1
    name, plural = nouns()[words[at]]
    at += 1
    # Behind an article, a number or a colour the last of several nouns is the thing, but a pine tree is a pine.
    while at < len(words) and words[at] in nouns() and (at - start > 1 or (name, words[at][:4]) == ("pine", "tree")):
        last, plural = nouns()[words[at]]
        name = name if (name, last) == ("pine", "tree") else last
        at += 1
    count = 1 if count is None and article in ("a", "an") else count
    if count == 1 and plural:
        return None, 1
    return Thing(name=name, plural=plural, count=count, colour=colour, definite=article == "the"), at - start
