"""Contexts for erasing concepts of the world: captions in its own grammar, with one concept put in another's place."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from mm.erasure.concepts import Concept
from mm.erasure.probes import Probe, Split
from mm.world import vocabulary as v
from mm.world.captions import BACKGROUND_PHRASES, STYLE_BEFORE, caption
from mm.world.concept_probes import world_probes
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
    if name in STYLE_BEFORE or name in BACKGROUND_PHRASES:
        return any(re.search(rf"\b{re.escape(phrase)}\b", prompt) for phrase in _phrases(name, ""))
    singular, plural = forms(name)
    return bool(set(tokens(prompt)) & {*singular, *plural})


class WorldContexts:
    """The world's own captions. Every concept that can be erased is known, so an unknown one is an error."""

    closed = True

    def known(self) -> tuple[str, ...]:
        """Everything that can be named as a target."""
        return (*v.OBJECTS, *v.STYLES, *v.COLOURS, *v.BACKGROUNDS)

    def forms(self, name: str) -> tuple[str, ...]:
        """Every word that stands for a concept."""
        return tuple(word for words in forms(name) for word in words)

    def candidates(self) -> tuple[str, ...]:
        """Objects of the world."""
        return v.OBJECTS

    def anchor(self, concept: Any, near: Any, targets: Sequence[str]) -> str:
        """The nearest object that is no target; for styles the plain one, for colours the natural one (no word), for
        backgrounds the plain one."""
        if concept.name in v.STYLES:
            return next(s for s in v.STYLES if s not in targets)
        if concept.name in v.COLOURS:
            return ""
        if concept.name in v.BACKGROUNDS:
            return next(b for b in ("plain", *v.BACKGROUNDS) if b not in targets)
        return near.nearest(concept.name, 1, targets)[0]

    def pairs(self, target: Any, anchor: str, count: int = MOST) -> list[tuple[str, str]]:
        """At most `count` captions with the target in an object's place, each with the anchor in the same place."""
        if target.name in v.OBJECTS:
            return self._objects(target.name, anchor, count)
        return self._words(target.name, anchor, target.of, count)

    def _objects(self, target: str, anchor: str, count: int) -> list[tuple[str, str]]:
        rng = random.Random(f"pairs {target}")
        made: list[tuple[str, str]] = []
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
        """Captions that hold one of a concept's phrases, with the anchor's in its place."""
        swaps = _phrases(target, anchor)
        pattern = re.compile("|".join(rf"\b{re.escape(phrase)}\b" for phrase in swaps))
        found = [p for p in captions(40 * MOST, "words") if pattern.search(p)]
        if of is not None:
            found = [re.sub(rf"\b{target} \w+", f"{target} {of}", p, count=1) for p in found]
        made = [(p, joined(tokens(pattern.sub(lambda m: swaps[m.group()], p)))) for p in found[:count]]
        return [(target, anchor)] if not made and anchor else made

    def probes(
        self, targets: Sequence[Concept], retained: Sequence[str], *, split: Split = "report", each: int = 24
    ) -> list[Probe]:
        """Prompts by which an erasure is measured."""
        return world_probes(targets, retained, split=split, each=each)

    def retained(self, names: Sequence[str], targets: Sequence[Any]) -> list[str]:
        """General captions without a target, and for every name captions that hold it."""
        banned = [t.name for t in targets]
        plain = [p for p in captions(KEPT + 4 * MOST, "kept") if not any(holds(p, name) for name in banned)]
        made = plain[:KEPT]
        for name in names:
            if name in v.OBJECTS:
                made += [p for p, _ in self._objects(name, name, 16) if not any(holds(p, b) for b in banned)]
        return made


def _phrases(target: str, anchor: str) -> dict[str, str]:
    """The phrases of a style, a background or a colour, longest first, and what stands for each of them."""
    words = {target: anchor}
    for table in (STYLE_BEFORE, BACKGROUND_PHRASES):
        if target in table:
            other = table.get(anchor, ("",))
            words |= {phrase: other[i % len(other)] for i, phrase in enumerate(table[target])}
    return dict(sorted(words.items(), key=lambda item: -len(item[0])))


def _article(words: Sequence[str], spot: int, word: str) -> str:
    """The prompt with `word` at `spot`, and the article before it put right."""
    made = [*words[:spot], *([word] if word else []), *words[spot + 1 :]]
    if word and spot and made[spot - 1] in ("a", "an"):
        made[spot - 1] = "an" if word[0] in "aeiou" else "a"
    return joined(made)
