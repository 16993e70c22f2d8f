"""Contexts for erasing concepts of the world: captions in its own grammar, with one concept put in another's place."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from mm.world import vocabulary as v
from mm.world.captions import caption
from mm.world.scene import sample_scene

MOST = 96  # pairs of prompts a target
KEPT = 240  # general prompts that must stay


def forms(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The singular and the plural words for an object; other concepts have one word."""
    if name not in v.ALL_OBJECTS:
        return (name,), (name,)
    synonym = v.SYNONYMS.get(name)
    return ((name, synonym[0]), (v.PLURALS[name], synonym[1])) if synonym else ((name,), (v.PLURALS[name],))


@cache
def captions(count: int, seed: str) -> tuple[str, ...]:
    """Captions of random scenes that training may see, full and partial ones."""
    rng = random.Random(f"concepts {seed}")
    return tuple(caption(sample_scene(rng), rng, detail=rng.choice(("full", "partial"))) for _ in range(count))


def tokens(prompt: str) -> list[str]:
    """Words and marks of a prompt."""
    return re.findall(r"\w+(?:-\w+)*|[^\w\s]", prompt)


def joined(words: Sequence[str]) -> str:
    """Words and marks as a prompt."""
    return re.sub(r" ([,.])", r"\1", " ".join(words))


def holds(prompt: str, name: str) -> bool:
    """Whether a prompt names a concept, in any form."""
    singular, plural = forms(name)
    return bool(set(tokens(prompt)) & {*singular, *plural}) if " " not in name else name in prompt


class WorldContexts:
    """The world's own captions. Every concept that can be erased is known, so an unknown one is an error."""

    closed = True

    def known(self) -> tuple[str, ...]:
        """Everything that can be named as a target."""
        return (*v.OBJECTS, *v.STYLES, *v.COLOURS, *v.BACKGROUNDS)

    def candidates(self) -> tuple[str, ...]:
        """Objects of the world."""
        return v.OBJECTS

    def anchor(self, concept: Any, near: Any, targets: Sequence[str]) -> str:
        """The nearest object that is no target; for styles the plain one, for colours the natural one (no word)."""
        if concept.name in v.STYLES:
            return next(s for s in v.STYLES if s not in targets)
        if concept.name in v.COLOURS:
            return ""
        return near.nearest(concept.name, 1, targets)[0]

    def pairs(self, target: Any, anchor: str, count: int = MOST) -> list[tuple[str, str]]:
        """At most `count` captions with the target in an object's place, each with the anchor in the same place."""
        if target.name in v.OBJECTS:
            return self._objects(target.name, anchor, count)
        return self._words(target.name, anchor, target.of, count)

    def _objects(self, target: str, anchor: str, count: int) -> list[tuple[str, str]]:
        rng, made = random.Random(f"pairs {target}"), []
        places = {word: number for name in v.OBJECTS for number in (1, 0) for word in forms(name)[number]}
        into = [words[0] for words in forms(anchor)] if anchor else ["", ""]
        for prompt in captions(4 * MOST, "pairs"):
            words = tokens(prompt)
            spots = [i for i, word in enumerate(words) if word in places]
            if not spots or holds(prompt, target) or len(made) >= count:
                continue
            spot = rng.choice(spots)
            number = places[words[spot]]
            word = rng.choice(forms(target)[number])
            made.append((_article(words, spot, word), _article(words, spot, into[number])))
        return made

    def _words(self, target: str, anchor: str, of: str | None, count: int) -> list[tuple[str, str]]:
        """Captions that hold a word or phrase (a style, a background, a colour), with the anchor in its place."""
        found = [p for p in captions(40 * MOST, "words") if re.search(rf"\b{re.escape(target)}\b", p)]
        if of is not None:
            found = [re.sub(rf"\b{target} \w+", f"{target} {of}", p, count=1) for p in found]
        pairs = [(p, joined(tokens(re.sub(rf"\b{re.escape(target)}\b", anchor, p)))) for p in found[:count]]
        return [(target, anchor)] if not pairs and anchor else pairs

    def retained(self, names: Sequence[str], targets: Sequence[Any]) -> list[str]:
        """General captions without a target, and for every name captions that hold it."""
        banned = [t.name for t in targets]
        plain = [p for p in captions(KEPT + 4 * MOST, "kept") if not any(holds(p, name) for name in banned)]
        made = plain[:KEPT]
        for name in names:
            if name in v.OBJECTS:
                made += [p for p, _ in self._objects(name, name, 16) if not any(holds(p, b) for b in banned)]
        return made


def _article(words: Sequence[str], spot: int, word: str) -> str:
    """The prompt with `word` at `spot`, and the article before it put right."""
    made = [*words[:spot], *([word] if word else []), *words[spot + 1 :]]
    if word and spot and made[spot - 1] in ("a", "an"):
        made[spot - 1] = "an" if word[0] in "aeiou" else "a"
    return joined(made)
