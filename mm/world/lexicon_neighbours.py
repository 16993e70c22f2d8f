"""Words of a prompt that are left out for the word beside them: "sitting" before "under", "bright" before "red"."""

from __future__ import annotations

from collections.abc import Sequence

from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.lexicon_tables import Tables
from mm.world.words import split

_GROUNDS = frozenset("sky night grass meadow field beach sea sand snow clouds".split())
_STYLES = frozenset({*v.STYLES, "pixel", "8-bit"})
_PLACING = frozenset(
    {split(phrase)[0] for table in (c.BACKGROUND_PHRASES, c.RELATION_PHRASES) for p in table.values() for phrase in p}
    | {"next", "beside", "near", "underneath", "atop", "to", "with", "and", "alongside"}
)


def without_neighbours(words: Sequence[str], table: Tables) -> list[str]:
    """Without postures before a word that places, shades before a colour, and the like.

    Left out are also scenery before the name of a background, parts of a body behind a colour, and words that describe
    a style that is named.

    Args:
        words: Of a prompt, before synonyms are replaced.
        table: Of drawing.
    """
    out: list[str] = []
    styled = any(_known(word, table) in _STYLES for word in words)
    for word, after in zip(words, [*words[1:], ""], strict=True):
        before, after_as = _known(out[-1] if out else "", table), _known(after, table)
        posture = word in table.postures and after in _PLACING
        shade = word in table.shades and (after_as in v.COLOURS or after in table.shades)
        scenery = word in table.scenery and after_as in _GROUNDS
        part = word in table.parts and before in v.COLOURS
        if not (posture or shade or scenery or part or (styled and word in table.flavours)):
            out.append(word)
    return out


def once(words: Sequence[str]) -> list[str]:
    """With a colour once where it is said twice, as in "lime green"."""
    pairs = zip(words, ["", *words], strict=False)
    return [word for word, before in pairs if not (word == before and word in v.COLOURS)]


def _known(word: str, table: Tables) -> str:
    return table.synonyms.get(word, word)
