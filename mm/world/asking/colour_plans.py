"""Plans for questions about colours; parts of `mm.world.asking.plans`."""

from __future__ import annotations

from collections.abc import Generator

from mm.world import vocabulary as v
from mm.world.asking import replies
from mm.world.asking import trained as t
from mm.world.asking.counting import Plan, in_colour
from mm.world.asking.query import Query, Thing
from mm.world.facts import Facts, read_caption
from mm.world.scene import Group

NATURAL = "natural colours"


def _no_colours(style: str) -> str | None:
    """Says that a style shows no colours; None where it does."""
    return None if v.shows_colour(style.strip(" .")) else f"no colours show in {style.strip(' .')} style"


def _own(group: Group, said: str | None = None) -> tuple[str, ...]:
    """The colours that a group of the description answers to; `said`: the model's answer about this group alone."""
    if group.colour is not None:
        return (said or group.colour,)
    natural = v.NATURAL_COLOURS[group.object]
    return (said, *natural) if said in natural else natural


def _spoken(group: Group, said: str | None = None) -> str:
    own = _own(group, said)
    return own[0] if own else NATURAL


def _facts_and_style() -> Generator[list[str], list[str], tuple[Facts, str]]:
    described, style = yield [t.DESCRIBE, t.STYLE]
    return read_caption(described), style


def _subject(query: Query, facts: Facts, topic: str | None) -> list[Thing]:
    """What a question is about; for "it" and "they", the topic of the conversation, or everything that is there."""
    if query.things:
        return list(query.things)
    names = list(dict.fromkeys(g.object for g in facts.groups))
    return [Thing(name=topic)] if topic in names and topic is not None else [Thing(name=name) for name in names]


def _seen(thing: Thing, query: Query, facts: Facts) -> Generator[list[str], list[str], tuple[list[Group], str, bool]]:
    """The groups of a thing, the model's own answer about its colour, and whether the thing is there."""
    groups = facts.named(thing.name)
    number = sum(g.count for g in groups) or (2 if thing.plural else 1)
    there, said = yield [t.existence(thing.name), query.trained or t.colour(thing.name, number)]
    return groups, said, bool(groups) or there.strip(" .") != "no"


def colour(query: Query, topic: str | None) -> Plan:
    """ "what colour is the cat?", "what colour is it?" """
    facts, style = yield from _facts_and_style()
    things = _subject(query, facts, topic)
    said = []
    for thing in things:
        groups, answer, there = yield from _seen(thing, query, facts)
        if not there:
            return replies.no_thing(thing)
        if (hidden := _no_colours(style)) is not None:
            return hidden
        if len({g.colour for g in groups}) > 1:
            words = replies.listed([_spoken(g) for g in groups])
        elif not groups or groups[0].colour is not None or thing.name not in v.NATURAL_COLOURS:
            words = answer
        else:
            words = _spoken(groups[0], answer.strip(" ."))
        number = sum(g.count for g in groups)
        said.append((f"{replies.the(thing, number)} {'is' if number < 2 else 'are'} {words}", words))
    return said[0][1] if len(said) == 1 else replies.listed([sentence for sentence, _ in said])


def is_colour(query: Query, topic: str | None) -> Plan:
    """ "is the cat red?" """
    facts, style = yield from _facts_and_style()
    things = _subject(query, facts, topic)
    holds, facts_said = True, []
    for thing in things:
        groups, answer, there = yield from _seen(thing, query, facts)
        if not there:
            return f"no, {replies.no_thing(thing)}"
        if (hidden := _no_colours(style)) is not None:
            return hidden
        if len({g.colour for g in groups}) > 1:
            holds = holds and all(in_colour(g, query.value) for g in groups)
            facts_said.append(replies.listed([_spoken(g) for g in groups]))
        elif not groups:
            holds = holds and answer.strip(" .") == query.value
            facts_said.append(answer)
        else:
            holds = holds and query.value in _own(groups[0], answer.strip(" ."))
            facts_said.append(_spoken(groups[0], answer.strip(" .")))
    if not things:
        return "no"
    said = "yes" if holds != query.negated else "no"
    verb = "it is" if len(things) == 1 and not things[0].plural else "they are"
    return f"{said}, {verb} {replies.listed(facts_said)}" if query.negated or query.explicit else said


def which_colour(query: Query, topic: str | None) -> Plan:
    """ "what is red?", "is anything red?" """
    facts, style = yield from _facts_and_style()
    if (hidden := _no_colours(style)) is not None:
        return hidden
    wanted = {name for thing in query.things for name in thing.objects} or set(v.ALL_OBJECTS)
    there = [g for g in facts.groups if g.object in wanted]
    held = [g for g in there if in_colour(g, query.value)]
    if query.relation == "count":
        return replies.number_word(sum(g.count for g in held))
    if query.join == "none":  # a list is asked for
        return replies.listed([replies.the(g.object, g.count) for g in held], "nothing")
    holds = bool(held) and (query.join == "any" or len(held) == len(there))
    return "yes" if holds != query.negated else "no"


def colours(query: Query, topic: str | None) -> Plan:
    """ "name the colours", "how many colours are there?" """
    facts, style = yield from _facts_and_style()
    if (hidden := _no_colours(style)) is not None:
        return hidden
    found = dict.fromkeys(_spoken(g) for g in facts.groups)
    if query.value == "count":
        return replies.number_word(len(found))
    return replies.listed(list(found))


def same_colour(query: Query, topic: str | None) -> Plan:
    """ "do the cat and the dog have the same colour?" """
    facts, style = yield from _facts_and_style()
    sets = []
    for thing in query.things:
        groups, answer, there = yield from _seen(thing, query, facts)
        if not there:
            return f"no, {replies.no_thing(thing)}"
        sets.append({colour for g in groups for colour in _own(g, answer.strip(" .") if len(groups) == 1 else None)})
    if (hidden := _no_colours(style)) is not None:
        return hidden
    return "yes" if bool(sets[0] & sets[1]) != query.negated else "no"
