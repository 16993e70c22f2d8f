"""Removes from a drawing prompt what is no description: contractions, "could you draw me", "a picture that shows".

Design choices
- The words of a request are dropped one by one at the beginning, so that a new order of them needs no new phrase. A
  word that may also belong to what is drawn ("to", "for") is dropped only behind one that cannot.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from mm.world.captions import article
from mm.world.lexicon_tables import raw

_TRAINED_MEDIA = ("picture", "image", "photo", "drawing")
_MARKS = (",", ":", "-", ".", "!", "?", ";")
_GROUND = r"(?:(?:blue|night|open) )?(?:sky|grass|lawn|meadow|beach|sea|ocean|snow|clouds)"
# Spellings that are brought into another before words are split.
_SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"[\u2018\u2019`\u00b4]", "'"),
    (r"\b(that|there|it|he|she|here|what|who|which)'s\b", r"\1 is"),
    (r"\bi'm\b", "i am"),
    (r"\b(i|we|you)'(?:d|ll)\b", r"\1 would"),
    (r"\blet's\b", "let us"),
    (r"-(?=(?:style|styled|like|coloured|colored|toned|themed)\b)", " "),
    (r"\b(\d+)\s?x(?=\s)|\bx\s?(\d+)\b", r"\1\2"),
    (r"\s/\s", ", "),
    (r"\b(on|to|at) (?:its|their|his|her) (left|right)\b", r"\1 the \2"),
    (r"\b(left|right)[ -]hand\b", r"\1"),
    (r"(?:\b(?:with|and|but),? )?\b(?:no|without(?: an?| any)?) background\b", "with a plain background"),
    (
        r"(?:\b(?:with|and|but) )?\bnothing (?:else )?(?:around|behind|in the background)(?: it| them)?\b",
        "with a plain background",
    ),
    (rf"\bin front of (?=(?:an? |the )?{_GROUND}\b)", "on "),
    (rf"\b({_GROUND}) behind\b(?: it| them)?", r"\1"),
    (r"\b(left|right) (?:to|from)(?= (?:an?|the|one)\b)", r"\1 of"),
)


@dataclass(frozen=True, kw_only=True)
class _Requests:
    """The word lists of [request] in the file.

    Attributes:
        begin: Words that begin a request.
        further: Words that continue one.
        media: Kinds of pictures.
        showing: Words that join a kind of picture to what it shows.
    """

    begin: frozenset[str]
    further: frozenset[str]
    media: frozenset[str]
    showing: frozenset[str]


@cache
def _requests() -> _Requests:
    return _Requests(**{name: frozenset(words.split()) for name, words in raw()["request"].items()})


def in_one_spelling(text: str) -> str:
    """A drawing prompt in lower case without contractions, multiplication signs and some compounds."""
    text = text.lower()
    for pattern, new in _SPELLINGS:
        text = re.sub(pattern, new, text)
    return text


def without_request(words: Sequence[str]) -> list[str]:
    """A prompt without "please draw me", and with "a picture of" in place of "an image that shows".

    Args:
        words: The words of a prompt.

    Returns:
        The words that are left; all of them where none would be left.
    """
    asked = _requests()
    at = 0
    while at < len(words) and (words[at] in asked.begin or (at and words[at] in (*asked.further, *_MARKS))):
        at += 1
    start = at
    while at < len(words) and words[at] in ("a", "an", "the", "this", "some", "one", "my"):
        at += 1
    medium = at
    while at < len(words) and words[at] in asked.media:
        at += 1
    shown = at
    while at < len(words) and words[at] in (*asked.showing, *_MARKS):
        at += 1
    if at == len(words) or medium == shown or shown == at:
        return list(words[start:] or words)
    named = words[shown - 1] if words[shown - 1] in _TRAINED_MEDIA else "picture"
    return [article(named), named, "of", *words[at:]]


def with_plain_pages(words: Sequence[str]) -> list[str]:
    """A prompt with "plain background" in place of "a clean white page" and the like.

    Args:
        words: The words of a prompt.
    """
    pages, bare = (frozenset(raw()["fillers"][name].split()) for name in ("pages", "bare"))
    out: list[str] = []
    at = 0
    while at < len(words):
        end = at
        while end < len(words) and words[end] in bare:
            end += 1
        if end > at and end < len(words) and words[end] in pages:
            out += ["plain", "background"]
            at = end + 1
        else:
            out.append(words[at])
            at += 1
    return out
