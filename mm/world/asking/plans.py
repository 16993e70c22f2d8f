"""Answers a query by questions that the model was trained on, and by rules over their answers.

Design choices
- A plan is a generator: it yields lists of trained questions, is sent the model's answers, and returns the reply. Plans
  of several pictures are run in step, so that all their questions go to the model in one batch (`run`).
- A question about a thing first asks whether it is there. The model was never asked about the number or colour of what
  is absent, and answers at random. A thing is absent where both the answer and the description say so: on tuning scenes
  neither ever misses a thing that is there, and one of 2307 absent ones was said to be there.
- What no trained question asks (lists, colours of several groups, fruit) is read from the model's description.
- A tint that the description does not name is natural: then the natural colours of `vocabulary` count.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from mm.world import vocabulary as v
from mm.world.asking import colour_plans, replies
from mm.world.asking import trained as t
from mm.world.asking.counting import Plan, counts, covered, facts_of, ground_shows, in_colour
from mm.world.asking.query import Query, Thing, Unread

T = TypeVar("T")
Ask = Callable[[list[int], list[str]], list[str]]
_PHRASES = {"sky": "in the sky", "night": "at night", "grass": "on grass", "beach": "on the beach"}
_PHRASES |= {"snow": "in the snow", "plain": "on a plain background"}


def plan(query: Query | Unread, topic: str | None = None) -> Plan:
    """The plan that answers a query.

    Args:
        query: From `mm.world.asking.parse`.
        topic: The object that "it" stands for, where the picture alone does not say.
    """
    if isinstance(query, Unread):
        return replies.unread(query)
        yield []  # makes this a generator
    reply = yield from _PLANS[query.kind](query, topic)
    return reply.strip() or replies.NO_ANSWER


def run(plans: Sequence[Generator[list[str], list[str], T]], ask: Ask) -> list[T]:
    """Runs plans to their ends.

    Args:
        plans: One for each question.
        ask: Is given plan numbers and questions, pairwise, and returns the model's answers.

    Returns:
        The result of each plan, a reply for instance.
    """
    said: dict[int, T] = {}
    waiting: dict[int, list[str]] = {}

    def advance(i: int, answers: list[str] | None) -> None:
        try:
            waiting[i] = next(plans[i]) if answers is None else plans[i].send(answers)
        except StopIteration as end:
            said[i] = end.value

    for i in range(len(plans)):
        advance(i, None)
    while waiting:
        now, waiting = waiting, {}
        rows = [i for i, questions in now.items() for _ in questions]
        answers = iter(ask(rows, [question for questions in now.values() for question in questions]))
        for i, questions in now.items():
            advance(i, [next(answers) for _ in questions])
    return [said[i] for i in range(len(plans))]


def _yes_no(holds: bool, query: Query, because: str = "") -> str:
    """Yes or no; with the fact where a negation makes them ambiguous."""
    said = "yes" if holds != query.negated else "no"
    return f"{said}, {because}" if because and (query.explicit or query.negated) else said


def _describe(query: Query, topic: str | None) -> Plan:
    (said,) = yield [query.trained or t.DESCRIBE]
    return said


def _list(query: Query, topic: str | None) -> Plan:
    (thing,) = query.things
    facts = yield from facts_of()
    named = [replies.phrase(g) for g in facts.groups if g.object in thing.objects]
    if query.ground and not (yield from _on_ground(query.ground)):
        return "nothing"
    if query.value in ("", "about"):
        return replies.listed(named) if named or not query.value else replies.no_thing(thing)
    others = [g for g in facts.groups if g.object not in thing.objects]
    if query.value == "else":
        return replies.listed([replies.phrase(g) for g in others], "nothing else")
    if query.value == "exist else":
        return _yes_no(bool(others), query)
    alone = not others and bool(facts.groups)
    return "yes" if alone and (thing.plural or facts.groups[0].count == 1) else "no"


def _exist(query: Query, topic: str | None) -> Plan:
    plain = [thing for thing in query.things if covered(thing)]
    if len(query.things) == 1 and plain and not query.explicit and not query.ground:
        (said,) = yield [query.trained or t.existence(plain[0].name)]
        return said
    numbers = yield from counts(query.things)
    there = [_meets(number, thing) for number, thing in zip(numbers, query.things, strict=True)]
    if query.join == "either":
        present = [
            replies.some_thing(x, n).split(maxsplit=2)[2] for x, n in zip(query.things, numbers, strict=True) if n
        ]
        return replies.listed([words.removesuffix(" in the picture") for words in present], "neither")
    if query.join == "none":
        present = [replies.some_thing(x, n) for x, n in zip(query.things, numbers, strict=True) if n]
        return (
            f"no, {present[0]}"
            if present
            else f"yes, {replies.listed(list(map(_name, query.things)), word='and')} are absent"
        )
    holds = any(there) if query.join == "any" else all(there)
    if query.ground:
        holds = (yield from _on_ground(query.ground)) and holds
    thing, number = query.things[0], numbers[0]
    fact = replies.some_thing(thing, number) if number else replies.no_thing(thing)
    return _yes_no(holds, query, fact if len(query.things) == 1 else "")


def _name(thing: Thing) -> str:
    return thing.name if thing.plural else f"the {thing.name}"


def _meets(number: int, thing: Thing) -> bool:
    """Whether a number is what a phrase asks for: its own number, or one at least."""
    if thing.count is None:
        return number > 0
    asked = thing.count
    tests = {"exactly": number == asked, "at least": number >= asked, "at most": number <= asked}
    return (tests | {"more than": number > asked, "fewer than": number < asked})[thing.bound]


def _count(query: Query, topic: str | None) -> Plan:
    if query.value == "kinds":
        facts = yield from facts_of()
        return replies.number_word(len({g.object for g in facts.named(*query.things[0].objects)}))
    numbers = yield from counts(query.things, query.trained)
    if query.ground and not (yield from _on_ground(query.ground)):
        return "none"
    if len(numbers) == 1:
        return numbers[0] if isinstance(numbers[0], str) else replies.number_word(numbers[0])
    parts = [
        f"{'no' if n == 0 else replies.number_word(n)} {v.plural(x.name, n) if x.name in v.PLURALS else x.name}"
        for n, x in zip(numbers, query.things, strict=True)
    ]
    return replies.listed(parts)


def _compare(query: Query, topic: str | None) -> Plan:
    a, b = yield from counts(query.things)
    if query.value.endswith(" by"):
        return replies.number_word(max(b - a if query.value == "fewer by" else a - b, 0))
    holds = {"more": a > b, "fewer": a < b, "same": a == b}[query.value]
    return _yes_no(holds, query)


def _most(query: Query, topic: str | None) -> Plan:
    a, b = yield from counts(query.things)
    if a == b:
        return f"neither: there are {replies.number_word(a)} of each" if a else "neither: there are none of both"
    first = (a > b) != (query.value == "fewer")
    thing = query.things[0 if first else 1]
    return v.PLURALS.get(thing.name, thing.name)


def is_absent(thing: Thing) -> Generator[list[str], list[str], bool]:
    """Whether a picture does not show a thing."""
    said = yield [t.existence(thing.name)]
    return (yield from _missing([thing], said)) is not None


def _missing(things: Sequence[Thing], said: Sequence[str]) -> Generator[list[str], list[str], Thing | None]:
    """The first thing that is absent, by the answers to whether each is there and by the description."""
    doubtful = [x for x, answer in zip(things, said, strict=True) if answer.strip(" .") == "no" or x.colour is not None]
    if not doubtful:
        return None
    facts = yield from facts_of()
    there = [[g for g in facts.named(thing.name) if in_colour(g, thing.colour)] for thing in doubtful]
    return next((thing for thing, held in zip(doubtful, there, strict=True) if not held), None)


def _position(query: Query, topic: str | None) -> Plan:
    things = list(query.things)
    if len(things) == 1:
        facts = yield from facts_of()
        others = [g.object for g in facts.groups if g.object != things[0].name]
        if topic not in others and len(set(others)) != 1:
            return f"I do not know what is meant by it. {replies.CAN_ASK}"
        things = [Thing(name=topic if topic is not None and topic in others else others[0]), *things]
    asked = query.trained or t.position(things[0].name, query.relation, things[1].name)
    *there, said = yield [t.existence(thing.name) for thing in things] + [asked]
    absent = yield from _missing(things, there)
    if absent is not None:
        return f"no, {replies.no_thing(absent)}"
    if not query.negated:
        return said
    return "no" if said.strip(" .") == "yes" else "yes"


def _which_relation(query: Query, topic: str | None) -> Plan:
    first, second = query.things
    relations = [name for name in v.RELATIONS if name in query.value]
    questions = [t.position(first.name, relation, second.name) for relation in relations]
    *there, one, two = yield [t.existence(first.name), t.existence(second.name), *questions]
    absent = yield from _missing(query.things, there)
    if absent is not None:
        return replies.no_thing(absent)
    return replies.listed(
        [r for r, said in zip(relations, (one, two), strict=True) if said.strip(" .") == "yes"], "neither"
    )


def _which(query: Query, topic: str | None) -> Plan:
    asked, anchor = query.things
    facts = yield from facts_of()
    if not facts.named(anchor.name):
        return replies.no_thing(anchor)
    names = list(dict.fromkeys(g.object for g in facts.groups if g.object in asked.objects and g.object != anchor.name))
    said = (yield [t.position(name, query.relation, anchor.name) for name in names]) if names else []
    held = [name for name, answer in zip(names, said, strict=True) if answer.strip(" .") == "yes"]
    if query.value == "exist":
        return _yes_no(bool(held), query)
    number = {name: sum(g.count for g in facts.named(name)) for name in held}
    if query.value == "count":
        return replies.number_word(sum(number.values()))
    return replies.listed([replies.the(name, number[name]) for name in held], "nothing")


def _where(query: Query, topic: str | None) -> Plan:
    thing = query.things[0]
    facts = yield from facts_of()
    if not facts.named(*thing.objects):
        return replies.no_thing(thing)
    others = list(dict.fromkeys(g.object for g in facts.groups if g.object not in thing.objects))
    asked = [(other, relation) for other in others for relation in v.RELATIONS]
    name = facts.named(*thing.objects)[0].object
    said = (yield [t.position(name, relation, other) for other, relation in asked]) if asked else []
    held = [f"{r} {replies.the(o)}" for (o, r), answer in zip(asked, said, strict=True) if answer.strip(" .") == "yes"]
    ground = [_PHRASES[facts.background]] if facts.background in _PHRASES else []
    return ", ".join(filter(None, (replies.listed(held, ""), *ground))) or "alone in the picture"


def _style(query: Query, topic: str | None) -> Plan:
    (said,) = yield [query.trained or t.STYLE]
    return said


def _is_style(query: Query, topic: str | None) -> Plan:
    (said,) = yield [t.STYLE]
    return _yes_no(said.strip(" .") == query.value, query, f"it is in {said} style")


def _background(query: Query, topic: str | None) -> Plan:
    said, style = yield [query.trained or t.BACKGROUND, t.STYLE]
    return said if ground_shows(style) else f"no background shows in {style} style"


def _on_ground(ground: str) -> Generator[list[str], list[str], bool]:
    said, style = yield [t.BACKGROUND, t.STYLE]
    return ground_shows(style) and _is(said, ground)


def _is(background: str, ground: str) -> bool:
    said = background.strip(" .")
    return said != "night" if ground == "day" else said == ground


def _is_ground(query: Query, topic: str | None) -> Plan:
    said, style = yield [t.BACKGROUND, t.STYLE]
    if not ground_shows(style):
        return f"no background shows in {style} style"
    return _yes_no(_is(said, query.value), query, f"the background is {said}")


def _time(query: Query, topic: str | None) -> Plan:
    said, style = yield [t.BACKGROUND, t.STYLE]
    if not ground_shows(style):
        return f"no time of day shows in {style} style"
    return "night" if said.strip(" .") == "night" else "day"


_PLANS: dict[str, Callable[[Query, str | None], Plan]] = {
    "describe": _describe, "list": _list, "exist": _exist, "count": _count, "compare": _compare, "most": _most,
    "position": _position, "which": _which, "which relation": _which_relation, "where": _where, "style": _style,
    "is style": _is_style,
    "background": _background, "is ground": _is_ground, "time": _time, "colour": colour_plans.colour,
    "is colour": colour_plans.is_colour, "which colour": colour_plans.which_colour, "colours": colour_plans.colours,
    "same colour": colour_plans.same_colour,
}  # fmt: skip
