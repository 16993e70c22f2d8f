"""Contexts for erasing concepts of the world: captions in its own grammar, with one concept put in another's place."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from mm.erasure.concepts import Concept, Kind
from mm.erasure.probes import Probe, Split
from mm.erasure.routes import Edit
from mm.world import vocabulary as v
from mm.world.captions import caption
from mm.world.concept_edits import world_edits
from mm.world.concept_probes import world_probes
from mm.world.concept_words import CONCEPTS, forms, holds, joined, named, nearest, phrases, tokens, with_article
from mm.world.scene import sample_scene
from mm.world.words import WORDS, split

MOST = 96  # pairs of prompts a target
KEPT = 240  # general prompts that must stay


@cache
def captions(count: int, seed: str) -> tuple[str, ...]:
    """Captions of random scenes that training may see, full and partial ones."""
    rng = random.Random(f"concepts {seed}")
    return tuple(caption(sample_scene(rng), rng, detail=rng.choice(("full", "partial"))) for _ in range(count))


class WorldContexts:
    """The world's own captions. Every concept that can be erased is known, so an unknown one is an error."""

    def known(self) -> tuple[str, ...]:
        """Everything that can be named as a target."""
        return tuple(name for names in CONCEPTS.values() for name in names)

    def concept(self, text: str) -> tuple[Concept, str] | None:
        """The concept that a text names, in any word for it that prompts know, and what it is; None where it is none.

        A colour is an attribute. A background counts as an object: it is something that is drawn.
        """
        found = named(text)
        if found is None:
            return None
        kinds: dict[str, Kind] = {"style": "style", "colour": "attribute"}
        return Concept(name=found[0], kind=kinds.get(found[1], "object")), found[1]

    def nearest(self, word: str) -> tuple[str, ...]:
        """The concepts nearest to a thing that the world lacks."""
        return nearest(word)

    def unknown(self, text: str) -> list[str]:
        """Words of a text that no vocabulary of the world has; new words in angle brackets may have been learned."""
        return [word for word in split(re.sub(r"<[^<>\s]+>", " ", text.lower())) if word not in WORDS]

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
            made.append((with_article(words, spot, word), with_article(words, spot, into[number])))
        return made

    def _words(self, target: str, anchor: str, of: str | None, count: int) -> list[tuple[str, str]]:
        """Captions that hold one of a concept's phrases, with the anchor's in its place."""
        swaps = phrases(target, anchor)
        pattern = re.compile("|".join(rf"\b{re.escape(phrase)}\b" for phrase in swaps))
        found = [p for p in captions(40 * MOST, "words") if pattern.search(p)]
        if of is not None:
            found = [re.sub(rf"\b{target} \w+", f"{target} {of}", p, count=1) for p in found]
        made = [(p, joined(tokens(pattern.sub(lambda m: swaps[m.group()], p)))) for p in found[:count]]
        return [(target, anchor)] if not made and anchor else made

    def edits(self, targets: Sequence[Any], anchors: Mapping[str, str], count: int) -> list[Edit]:
        """Instructions for editing by which concepts are erased and others are kept."""
        return world_edits(targets, anchors, count)

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
