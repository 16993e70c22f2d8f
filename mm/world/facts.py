"""What a caption says: groups, background, style and relation, read from words of the grammar."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.demand_symbols import nouns
from mm.world.scene import Group

_COUNTS = {word: n for n, words in c.COUNT_WORDS.items() for word in words} | {"an": 1}
_NOUNS = {noun: name for noun, (name, _) in nouns().items()}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a description says: groups in order, background, style, and a relation of the first to the second group."""

    groups: tuple[Group, ...]
    background: str | None
    style: str
    relation: str | None

    def named(self, *names: str) -> list[Group]:
        """The groups of these objects; all without a name."""
        return [g for g in self.groups if not names or g.object in names]


def read_caption(text: str) -> Facts:
    """The facts of a caption in the grammar's words; what is not understood is passed over."""
    left = f" {' '.join(re.findall(r'[a-z0-9-]+', text.lower()))} "
    style = next((s for s in v.STYLES if f" {s} " in left), v.DEFAULT_STYLE)
    background = None
    for name, phrases in c.BACKGROUND_PHRASES.items():
        for phrase in sorted(phrases, key=len, reverse=True):
            if f" {phrase} " in left:
                background, left = name, left.replace(f" {phrase} ", " ")
    link = next((r for r, ws in c.RELATION_PHRASES.items() for w in ws if f" {w} " in left), None)
    found: list[Group] = []
    count, colour = 1, None
    for word in left.split():
        if word in _COUNTS:
            count, colour = _COUNTS[word], None
        elif word in v.COLOURS:
            colour = word
        elif word in _NOUNS:
            found.append(Group(object=_NOUNS[word], colour=colour, count=count))
            count, colour = 1, None
    return Facts(groups=tuple(found), background=background, style=style, relation=link)
