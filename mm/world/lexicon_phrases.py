"""What is left of a prompt when words of it are left out: whole noun phrases, with correct joins and articles.

Design choices
- With a thing that is left out go its article, number and colour, and the word that joins it to the rest: of "a red hat
  and a cat" remains "a cat", and of "a cat with a hat" the same.
- Where a word bound two things ("riding", "between"), the two are joined by "and".
- Texts of the models' own grammar hold no marks, so they pass unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.demand_symbols import NUMBERS
from mm.world.lexicon_tables import Phrase
from mm.world.words import split

# Marks in place of words that are left out; no word of a text has a NUL.
THING = "\0thing"  # a noun
TRAIT = "\0trait"  # an adjective, or what else belongs to a neighbour
BOND = "\0bond"  # what binds two things

COUNTS = frozenset(word for word, number in NUMBERS.items() if number and word not in ("single", "pair"))
_BEFORE_NOUNS = frozenset({"a", "an", "the", "single", *COUNTS, *v.COLOURS})
_JOINS: tuple[Phrase, ...] = (("and",), ("with",), ("or",), (",",), ("next", "to"), ("beside",), (BOND,))
_PLACING: tuple[Phrase, ...] = (("in",), ("on",), ("at",), ("by",), ("under",), ("among",), ("against",))


@cache
def _relations() -> tuple[Phrase, ...]:
    phrases = {tuple(split(p)) for choices in c.RELATION_PHRASES.values() for p in choices}
    return tuple(sorted(phrases, key=len, reverse=True))


@cache
def backgrounds() -> frozenset[Phrase]:
    """The phrases of the grammar that say where something is."""
    return frozenset(tuple(split(p)) for choices in c.BACKGROUND_PHRASES.values() for p in choices)


def without_marks(words: list[str], nouns: frozenset[str]) -> list[str]:
    """The words without the marks, and without what belonged to the words that were there.

    Args:
        words: With marks.
        nouns: Words for things of the world.
    """
    out = [word for word in words if word != TRAIT]
    while THING in out:
        out = _without_thing(out, out.index(THING), nouns)
    out = _joined(out, nouns)
    out = [word for word, after in zip(out, [*out[1:], ""], strict=False) if word != "and" or (after,) not in _JOINS]
    while out and _ending(out, len(out), (*_JOINS, *_PLACING)):
        out = out[: -_ending(out, len(out), (*_JOINS, *_PLACING))]
    return out


def with_articles(words: Sequence[str]) -> list[str]:
    """With a or an as the next word needs it."""
    pairs = zip(words, [*words[1:], "."], strict=False)
    return [c.article(after) if word in ("a", "an") and after[0].isalnum() else word for word, after in pairs]


def starts_thing(words: list[str], nouns: frozenset[str]) -> bool:
    """Whether the words begin with a noun phrase."""
    at = 0
    while at < len(words) and words[at] in _BEFORE_NOUNS:
        at += 1
    return at < len(words) and (words[at] in nouns or words[at] == THING)


def _without_thing(words: list[str], at: int, nouns: frozenset[str]) -> list[str]:
    """Without the thing at a position and what belonged to it."""
    start = at
    if words[max(start - 3, 0) : start] == ["a", "pair", "of"]:
        start -= 3
    while start and words[start - 1] in _BEFORE_NOUNS:
        start -= 1
    left, right = words[:start], words[at + 1 :]
    joined = _ending(left, len(left), (*_relations(), *_JOINS, *_PLACING))
    if joined:
        while joined:
            left = left[:-joined]
            joined = _ending(left, len(left), (*_relations(), *_JOINS, *_PLACING))
        return left + right
    right, removed = _without_beginning(right, nouns)
    opener = left[-1:] == ["of"] and not starts_thing(right, nouns)
    return (left[:-1] if opener and not removed else left) + right


def _without_beginning(words: list[str], nouns: frozenset[str]) -> tuple[list[str], bool]:
    """Without joins at the beginning; a background's own words stay. And whether there were any."""
    removed = False
    while words and not any(tuple(words[: len(p)]) == p for p in backgrounds()):
        placing = _PLACING if starts_thing(words[1:], nouns) else ()
        hit = next((p for p in (*_relations(), *_JOINS, *placing) if tuple(words[: len(p)]) == p), None)
        if hit is None:
            break
        words, removed = words[len(hit) :], True
    return words, removed


def _ending(words: list[str], end: int, phrases: tuple[Phrase, ...]) -> int:
    """The length of the phrase that ends at a position; 0 for none."""
    return max((len(p) for p in phrases if tuple(words[max(end - len(p), 0) : end]) == p), default=0)


def _joined(words: list[str], nouns: frozenset[str]) -> list[str]:
    """With "and" for each bond between two things, and without the other bonds."""
    out: list[str] = []
    for at, word in enumerate(words):
        if word != BOND:
            out.append(word)
        elif out and out[-1] not in ("and", "with", ",") and starts_thing(words[at + 1 :], nouns):
            out.append("and")
    return out
