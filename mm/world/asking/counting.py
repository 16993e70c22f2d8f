"""How many of each thing a picture shows, by trained questions and the description."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from mm.world import vocabulary as v
from mm.world.asking import trained as t
from mm.world.asking.query import CATEGORIES, Thing
from mm.world.asking.replies import number_in
from mm.world.facts import Facts, read_caption
from mm.world.scene import Group

Plan = Generator[list[str], list[str], str]


def facts_of() -> Generator[list[str], list[str], Facts]:
    """The facts of the model's description."""
    (said,) = yield [t.DESCRIBE]
    return read_caption(said)


def ground_shows(style: str) -> bool:
    """Whether a style that the model names shows a background."""
    return v.shows_background(style.strip(" ."))


def covered(thing: Thing) -> bool:
    """Whether a trained question of existence is about just this thing: one object, no colour, no number."""
    return thing.name not in CATEGORIES and thing.colour is None and thing.count is None


def in_colour(group: Group, colour: str | None) -> bool:
    """Whether a group of the description has a colour; None is any."""
    return colour is None or (group.object in v.NATURAL_COLOURS and v.counts_as(group.object, group.colour, colour))


def _asked(thing: Thing, trained: str | None) -> list[str]:
    """The trained questions that count a thing; none where only the description does."""
    if thing.colour is not None or (thing.name in CATEGORIES and thing.name not in v.CATEGORIES):
        return []
    if thing.name in CATEGORIES:
        return [trained or t.count(thing.name)]
    return [t.existence(thing.name), trained or t.count(thing.name)]


def counts(things: Sequence[Thing], trained: str | None = None) -> Generator[list[str], list[str], list[Any]]:
    """How many of each thing there are.

    With `trained` (a count in a trained wording) of a thing that is there, the model's own answer as it is.
    """
    asked = [_asked(thing, trained) for thing in things]
    said = iter((yield [t.DESCRIBE, *(question for questions in asked for question in questions)]))
    facts = read_caption(next(said))
    out: list[Any] = []
    for thing, questions in zip(things, asked, strict=True):
        answers = [next(said) for _ in questions]
        seen = sum(g.count for g in facts.named(*thing.objects) if in_colour(g, thing.colour))
        out.append(_number(seen, answers, trained is not None))
    return out


def _number(seen: int, answers: Sequence[str], as_is: bool) -> int | str:
    """The number from the description's and the model's answers (none; a count; existence and a count)."""
    if not answers:
        return seen
    if len(answers) == 2 and answers[0].strip(" .") == "no" and not seen:
        return 0
    number = number_in(answers[-1])
    if len(answers) == 1 and seen > v.MAX_COUNT:  # more than the model was trained to say
        return seen
    if as_is:
        return answers[-1]
    return seen if number is None else number
