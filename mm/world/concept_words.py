"""The words of the world's concepts in prompts: finding them, and putting others in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mm.world import lexicon
from mm.world import vocabulary as v
from mm.world.captions import BACKGROUND_PHRASES, STYLE_BEFORE
from mm.world.demand_symbols import NUMBERS, symbols_of
from mm.world.lexicon_tables import tables
from mm.world.words import split

CONCEPTS: dict[str, tuple[str, ...]] = {
    "object": v.OBJECTS, "style": v.STYLES, "colour": v.COLOURS, "background": v.BACKGROUNDS,
}  # fmt: skip


def named(text: str) -> tuple[str, str] | None:
    """The concept that a text names, and what it is: a key of `CONCEPTS`.

    Words are read as those of prompts are (`mm.world.lexicon`): "kitty" and "kittens" are a cat. None where the text
    names no concept, several, or one with something else ("a red cat", "two cats"), and where a word is misspelled.
    """
    plain = " ".join(text.casefold().split())
    for what, names in CONCEPTS.items():
        if plain in names:
            return plain, what
    read, many = lexicon.read(plain), tables("draw").many
    # Prompts take a plural without a number as three things; a number that is said is more than the concept.
    counted = any(NUMBERS.get(word, 0) > 1 or word.isdigit() or (word,) in many for word in split(plain))
    symbols = [] if read.corrections or read.unknown or counted else symbols_of(split(read.text)) or []
    if len(symbols) != 1:
        return None
    thing = symbols[0].thing
    if thing is not None and thing.colour is not None:
        return None
    name = symbols[0].name if thing is None else thing.name
    return next(((name, what) for what, names in CONCEPTS.items() if name in names), None)


def nearest(word: str) -> tuple[str, ...]:
    """The concepts nearest to a thing that the world lacks, in the order of the lexicon; empty where it lists none."""
    table = tables("draw")
    found = table.near.get(word.casefold()) or table.colours.get(word.casefold()) or table.places.get(word.casefold())
    return tuple(name for name in found or () if any(name in names for names in CONCEPTS.values()))


def forms(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The singular and the plural words for an object; other concepts have one word."""
    if name not in v.ALL_OBJECTS:
        return (name,), (name,)
    synonym = v.SYNONYMS.get(name)
    return ((name, synonym[0]), (v.PLURALS[name], synonym[1])) if synonym else ((name,), (v.PLURALS[name],))


def tokens(prompt: str) -> list[str]:
    """Words and marks of a prompt."""
    return re.findall(r"\w+(?:-\w+)*|[^\w\s]", prompt)


def joined(words: Sequence[str]) -> str:
    """Words and marks as a prompt."""
    return re.sub(r" ([,.])", r"\1", " ".join(words))


def holds(prompt: str, name: str) -> bool:
    """Whether a prompt names a concept, in any form."""
    if name in STYLE_BEFORE or name in BACKGROUND_PHRASES:
        return any(re.search(rf"\b{re.escape(phrase)}\b", prompt) for phrase in phrases(name, ""))
    singular, plural = forms(name)
    return bool(set(tokens(prompt)) & {*singular, *plural})


def phrases(target: str, anchor: str) -> dict[str, str]:
    """The phrases of a style, a background or a colour, longest first, and what stands for each of them."""
    words = {target: anchor}
    for table in (STYLE_BEFORE, BACKGROUND_PHRASES):
        if target in table:
            other = table.get(anchor, ("",))
            words |= {phrase: other[i % len(other)] for i, phrase in enumerate(table[target])}
    return dict(sorted(words.items(), key=lambda item: -len(item[0])))


def with_article(words: Sequence[str], spot: int, word: str) -> str:
    """The prompt with `word` at `spot`, and the article before it put right."""
    made = [*words[:spot], *([word] if word else []), *words[spot + 1 :]]
    if word and spot and made[spot - 1] in ("a", "an"):
        made[spot - 1] = "an" if word[0] in "aeiou" else "a"
    return joined(made)
