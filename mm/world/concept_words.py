"""The words of the world's concepts in prompts: finding them, and putting others in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mm.world import vocabulary as v
from mm.world.captions import BACKGROUND_PHRASES, STYLE_BEFORE


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
