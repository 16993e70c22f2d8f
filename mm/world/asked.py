"""What a picture must show to be what was asked for, as numbers and as questions with their right answers.

Design choices
- Only what the reading of a prompt says for certain (`mm.world.demand`): a prompt that is not read in full gives None,
  and such a picture is not checked.
- Questions are in wordings that the model was trained on (`mm.world.asking.trained`). What no such question asks for
  certain is left out: the colour of one of two groups of cats, or the position of one of several.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mm.world import lexicon
from mm.world import vocabulary as v
from mm.world.asking import trained as t
from mm.world.captions import BACKGROUND_PHRASES, article
from mm.world.demand import Demand, demand_of
from mm.world.demand_symbols import nouns
from mm.world.scene import Group
from mm.world.words import split


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A question about a picture.

    Attributes:
        question: In a trained wording.
        answer: The right one.
        said: What the answer means, in words ("a red cat").
    """

    question: str
    answer: str
    said: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a picture must show.

    Attributes:
        numbers: For every thing, how many are like it, in ascending order (two cats and a dog are (1, 2, 2)); None
            where numbers are not asked for (changes of a picture).
        facts: Questions with their right answers.
        said: The numbers in words ("three stars").
    """

    numbers: tuple[int, ...] | None
    facts: tuple[Fact, ...] = ()
    said: str = ""


def asked_of(prompt: str) -> Asked | None:
    """What a picture of `prompt` must show; None where the prompt is not read in full.

    Things of one kind in one colour are one group.
    """
    demand = demand_of(split(lexicon.read(prompt).text))
    if demand is None:
        return None
    return Asked(
        numbers=tuple(sorted(group.count for group in demand.groups for _ in range(group.count))),
        facts=(*_of_groups(demand.groups), *_of_relation(demand), *_of_picture(demand.style, demand.background)),
        said=" and ".join(f"{group.count} {_noun(group.object, group.count)}" for group in demand.groups),
    )


def _noun(name: str, count: int) -> str:
    return v.plural(name, count) if name in v.PLURALS else name


def _of_groups(groups: Sequence[Group]) -> list[Fact]:
    """That each kind of thing is there, and its colour where the kind has one group."""
    names = [group.object for group in groups]
    facts = [_there(name) for name in dict.fromkeys(names)]
    for group in groups:
        if group.colour is not None and names.count(group.object) == 1:
            facts.append(_colour(group.object, group.count, group.colour))
    return facts


def _there(name: str) -> Fact:
    return Fact(question=t.existence(name), answer="yes", said=f"{article(name)} {name}")


def _gone(name: str) -> Fact:
    return Fact(question=t.existence(name), answer="no", said=f"no {name}")


def _colour(name: str, count: int, colour: str) -> Fact:
    said = f"{colour} {_noun(name, count)}"
    return Fact(question=t.colour(name, count), answer=colour, said=f"{article(said)} {said}" if count == 1 else said)


def _of_relation(demand: Demand) -> list[Fact]:
    if demand.relation is None:
        return []
    first, relation, second = demand.relation
    a, b = demand.groups[first], demand.groups[second]
    if a.object == b.object or not a.count == b.count == 1:
        return []
    return [_position(a.object, relation, b.object)]


def _position(first: str, relation: str, second: str) -> Fact:
    said = f"the {first} {relation} the {second}"
    return Fact(question=t.position(first, relation, second), answer="yes", said=said)


def _of_picture(style: str | None, background: str | None) -> list[Fact]:
    """Style and background, where they are named and can be seen."""
    facts = []
    if style is not None:
        facts.append(Fact(question=t.STYLE, answer=style, said=f"{style} style"))
    if background is not None and v.shows_background(style or v.DEFAULT_STYLE):
        facts.append(Fact(question=t.BACKGROUND, answer=background, said=BACKGROUND_PHRASES[background][0]))
    return facts


def asked_of_change(instruction: str) -> Asked | None:
    """What a picture must show after `instruction`, in a trained wording; None for one that no question checks."""
    line = " ".join(instruction.lower().split())
    for pattern, facts in _CHANGES:
        found = re.fullmatch(pattern, line)
        if found is not None:
            return Asked(numbers=None, facts=tuple(facts(*found.groups())))
    return None


def _recoloured(noun: str, colour: str) -> list[Fact]:
    name, count = _name(noun)
    return [_there(name), _colour(name, count, colour)]


def _removed(noun: str) -> list[Fact]:
    return [_gone(_name(noun)[0])]


def _added(colour: str | None, noun: str, relation: str | None, anchor: str | None) -> list[Fact]:
    name, count = _name(noun)
    facts = _of_groups([Group(object=name, colour=colour, count=count)])
    return facts if relation is None or anchor is None else [*facts, _position(name, relation, _name(anchor)[0])]


def _replaced(old: str, colour: str | None, new: str) -> list[Fact]:
    return [*_removed(old), *_added(colour, new, None, None)]


def _name(noun: str) -> tuple[str, int]:
    """The object that a noun names, and 1, or 2 for a plural."""
    name, plural = nouns()[noun]
    return name, 2 if plural else 1


def _one_of(words: Iterable[str]) -> str:
    return "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_NOUN, _STYLE = _one_of(nouns()), _one_of(v.STYLES)
_GROUND, _PLACED = _one_of(v.BACKGROUNDS), _one_of(choices[0] for choices in BACKGROUND_PHRASES.values())
_NEW = rf"(?:an? )?(?:{_one_of(v.COLOURS)} )?{_NOUN}"
_GROUND_OF = {phrase: name for name, phrases in BACKGROUND_PHRASES.items() for phrase in phrases}
# Trained wordings of changes (`mm.world.edits`), with what is true after each.
_CHANGES: tuple[tuple[str, Callable[..., list[Fact]]], ...] = (
    (rf"(?:make|turn|paint|change the colour of) the {_NOUN}(?: to)? {_one_of(v.COLOURS)}", _recoloured),
    (rf"(?:remove|delete|erase|take) the {_NOUN}(?: away)?", _removed),
    (rf"(?:add|put|draw) {_NEW}(?: (?:here|in the picture))?(?: {_one_of(v.RELATIONS)} the {_NOUN})?", _added),
    (rf"(?:replace|turn|change|swap) the {_NOUN} (?:with|into|for) {_NEW}", _replaced),
    (rf"(?:make it|turn it into|in) {_STYLE} style", lambda style: _of_picture(style, None)),
    (rf"change the style to {_STYLE}", lambda style: _of_picture(style, None)),
    (rf"(?:change|set|make) the background (?:to )?{_GROUND}", lambda ground: _of_picture(None, ground)),
    (rf"put it {_PLACED}", lambda phrase: _of_picture(None, _GROUND_OF[phrase])),
)
