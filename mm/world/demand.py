"""What a prompt in known words asks for: things with their numbers and colours, a position, a background, a style.

Design choices
- The order of the words is free: "at night, a violin, yellow" asks for what "a yellow violin at night" asks for. The
  models were trained on one order (`mm.world.captions`), so prompts of another are brought into it (`in_order`).
- A word that is not used makes the whole prompt unread (None): half a reading would change what was asked for.
- A plural without a number is `open`: three things where the kind is alone, and two where there are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.demand_symbols import Symbol, Thing, symbols_of
from mm.world.scene import Group
from mm.world.words import split

_OPEN_ALONE, _OPEN_BESIDE = 3, 2  # things that a plural without a number stands for
_CLOSE = ("with", "next to", "beside")  # joins of two things that training has seen beside "and"


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a prompt asks for.

    Attributes:
        groups: Things of one kind and colour with their number, in the order of the words.
        relation: (group, "left of", group); None where the words say none.
        background: None where the words name none.
        style: None where the words name none.
        open: Whether a number was not said.
        lone_side: Whether a thing is wanted at a side of the picture, which is a position to nothing.
        join: The word between two groups.
    """

    groups: tuple[Group, ...]
    relation: tuple[int, str, int] | None = None
    background: str | None = None
    style: str | None = None
    open: bool = False
    lone_side: bool = False
    join: str = "and"


@dataclass(kw_only=True)
class _Wanted:
    """A thing while its prompt is read."""

    thing: Thing
    colour: str | None
    side: str | None = None


def demand_of(words: Sequence[str]) -> Demand | None:
    """What the words of a prompt ask for; None where a word is not used, or what they say does not fit together.

    Args:
        words: In the models' own words (`mm.world.lexicon.read`), as `mm.world.words.split` gives them.
    """
    symbols = symbols_of(words)
    if symbols is None:
        return None
    styles = {s.name for s in symbols if s.kind == "S"}
    hinted = {s.name for s in symbols if s.kind == "H"}
    grounds = {s.name for s in symbols if s.kind == "G"}
    wanted: list[_Wanted] = []
    order = _resolved([s for s in symbols if s.kind not in "SHGO"], wanted)
    if order is None or not wanted or len(styles) > 1 or len(grounds) > 1 or not hinted <= (styles or {"pixel art"}):
        return None
    links = {_forward(link) for link in (*_related(order), *_placed(order, wanted))}
    sides = [one for one in wanted if one.side is not None]
    if None in links or len(links) > 1 or (links and len(wanted) != 2) or (sides and not links and len(wanted) > 1):
        return None
    joins = [s.name for s in order if isinstance(s, Symbol) and s.kind == "J" and s.name in _CLOSE]
    groups = _groups(wanted, merged=not links)
    return None if groups is None else Demand(
        groups=groups,
        relation=next(iter(links), None),
        background=next(iter(grounds), None),
        style=next(iter(styles | hinted), None),
        open=any(_is_open(one.thing) for one in wanted),
        lone_side=bool(sides and not links),
        join=joins[0] if len(joins) == 1 and len(wanted) == 2 else "and",
    )  # fmt: skip


def names_surroundings(words: Sequence[str]) -> bool:
    """Whether the words name a background or a style."""
    return any(symbol.kind in "GS" for symbol in symbols_of(words) or ())


def in_order(words: Sequence[str]) -> list[str]:
    """The words in the order that the models were trained with; unchanged where they are, or are not read in full."""
    found = demand_of(words)
    if found is None or is_trained(words, found):
        return list(words)
    return split(caption_of(found))


def caption_of(demand: Demand) -> str:
    """A demand in the grammar's first wording of each choice."""
    phrases = [next(_wordings(group)) for group in demand.groups]
    if demand.relation is not None:
        first, name, second = demand.relation
        body = f"{phrases[first]} {c.RELATION_PHRASES[name][0]} {phrases[second]}"
    else:
        body = f" {demand.join} ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    if demand.background is not None:
        body += " " + c.BACKGROUND_PHRASES[demand.background][0]
    return body if demand.style is None else f"{body}, {demand.style} style"


def is_trained(words: Sequence[str], demand: Demand) -> bool:
    """Whether the words are a caption of the models' own grammar, in any of its wordings."""
    rest = _after_any(list(words), [p for choices in c.STYLE_BEFORE.values() for p in choices])
    joins = ["and", ",", *_CLOSE, *(p for choices in c.RELATION_PHRASES.values() for p in choices)]
    wordings = [p for group in demand.groups for p in _wordings(group)]
    for at in range(len(demand.groups)):
        begun = rest if at == 0 else _after_any(rest, joins)
        after = _after_any(begun, wordings)
        if after == begun or (at and begun == rest):
            return False
        rest = after
    rest = _after_any(rest, [p for choices in c.BACKGROUND_PHRASES.values() for p in choices])
    return not _after_any(
        rest, [f"{b} {s}{e}" for s in v.STYLES for b, e in ((",", " style"), ("in", " style"), (",", ""))]
    )


def _after_any(words: list[str], beginnings: list[str]) -> list[str]:
    """The words after the longest of the beginnings that they have."""
    hits = [len(b) for b in map(split, beginnings) if words[: len(b)] == b]
    return words[max(hits, default=0) :]


def _wordings(group: Group) -> Iterator[str]:
    """All wordings of a group in the grammar, the plainest first."""
    for pair in ((group.object, v.PLURALS[group.object]), v.SYNONYMS.get(group.object)):
        if pair is not None:
            rest = " ".join(filter(None, (group.colour, pair[group.count > 1])))
            for count in c.COUNT_WORDS[group.count]:
                yield f"{c.article(rest) if count == 'a' else count} {rest}"


def _resolved(symbols: Sequence[Symbol], wanted: list[_Wanted]) -> list[Symbol | int] | None:
    """The order of things (by their index in `wanted`), relations, sides and joins; None where a word has no use.

    Colours behind a noun go to it ("a key in blue", "the crown is red"); "the crown" is one that was named before.
    """
    out: list[Symbol | int] = []
    tint: str | None = None
    for at, symbol in enumerate(symbols):
        after = symbols[at + 1].kind if at + 1 < len(symbols) else ""
        if symbol.thing is not None:
            out.append(_index(symbol.thing if tint is None else replace(symbol.thing, colour=tint), wanted))
        elif symbol.kind == "C":
            last = next((one for one in reversed(out) if isinstance(one, int)), None)
            if last is None and not out and len([s for s in symbols if s.thing is not None]) == 1:
                tint = symbol.name  # "red: a bear"
            elif last is None or wanted[last].colour is not None:
                return None
            else:
                wanted[last].colour = symbol.name
        elif symbol.kind == "#":
            if not _counts_last(int(symbol.name), out, wanted):
                return None
        elif symbol.kind != "P":
            out.append(symbol)
        elif after == "N" and symbol.name != "in":  # "a cat on a car", "a cat by a tree"; nothing is in a house
            out.append(Symbol(kind="R", name="above") if symbol.name == "on" else Symbol(kind="J", name="next to"))
        elif not (after == "C" and symbol.name == "in"):
            return None
    return out


def _counts_last(number: int, order: Sequence[Symbol | int], wanted: list[_Wanted]) -> bool:
    """Gives a number to the thing before it ("stars, three"); whether that had none."""
    last = next((one for one in reversed(order) if isinstance(one, int)), None)
    if last is None or wanted[last].thing.count is not None:
        return False
    wanted[last].thing = replace(wanted[last].thing, count=number)
    return True


def _index(thing: Thing, wanted: list[_Wanted]) -> int:
    """The index of a thing, which is added where it is new."""
    for at, one in enumerate(wanted):
        same = (
            thing.name == one.thing.name and thing.definite and thing.count is None and thing.plural == one.thing.plural
        )
        if same and (thing.colour is None or one.colour in (None, thing.colour)):
            one.colour = one.colour or thing.colour
            return at
    wanted.append(_Wanted(thing=thing, colour=thing.colour))
    return len(wanted) - 1


def _related(order: Sequence[Symbol | int]) -> Iterator[tuple[int, str, int] | None]:
    """The relations; None for one that lacks a thing.

    "a cat above a dog", "above the dog a cat", "a dog with a cat above it" and "a dog and above it a cat" are the same.
    """
    for at, one in enumerate(order):
        if isinstance(one, int) or one.kind != "R":
            continue
        before = [x for x in order[:at] if isinstance(x, int)]
        after = [x for x in order[at + 1 :] if isinstance(x, int)]
        pronoun = at + 1 < len(order) and order[at + 1] == Symbol(kind="I")
        begins = at == 0 or isinstance(order[at - 1], Symbol)
        if pronoun and before and after and begins:
            yield (after[0], one.name, before[-1])
        elif before and after and not pronoun:
            yield (before[-1], one.name, after[0])
        elif len(set(before)) > 1:
            yield (before[-1], one.name, before[0])
        elif len(set(after)) > 1:
            yield (after[1], one.name, after[0])
        else:
            yield None


def _forward(link: tuple[int, str, int] | None) -> tuple[int, str, int] | None:
    """A relation from the thing that is named first."""
    return link if link is None or link[0] < link[2] else (link[2], v.OPPOSITE[link[1]], link[0])


def _placed(order: Sequence[Symbol | int], wanted: list[_Wanted]) -> Iterator[tuple[int, str, int] | None]:
    """Relations by sides of the picture: "a moon on the left and a key on the right"."""
    first = next((x for x in order if isinstance(x, int) or x.kind in "ER"), None)
    for at, one in enumerate(order):
        if isinstance(one, int) or one.kind != "E":
            continue
        before = [x for x in order[:at] if isinstance(x, int)]
        after = [x for x in order[at + 1 :] if isinstance(x, int)]
        last = order[at - 1] if at else None
        begins = not isinstance(first, int) or (isinstance(last, Symbol) and last.name in ("and", "with"))
        target = (after or before)[0] if begins and after else before[-1]
        wanted[target].side = one.name
    sides = {at: one.side for at, one in enumerate(wanted) if one.side is not None}
    if len(wanted) == 2 and sides:
        at = max(sides)
        fits = len(sides) == 1 or sides[0] == v.OPPOSITE[str(sides[1])]
        yield (at, str(sides[at]), 1 - at) if fits else None


def _is_open(thing: Thing) -> bool:
    return thing.count is None and thing.plural is True


def _groups(wanted: Sequence[_Wanted], *, merged: bool) -> tuple[Group, ...] | None:
    """Things of one kind and colour together; None where there are more than a picture holds."""
    counts: dict[tuple[object, ...], int] = {}
    several = len({(one.thing.name, one.colour) for one in wanted}) > 1
    for at, one in enumerate(wanted):
        open_count = (_OPEN_BESIDE if several else _OPEN_ALONE) if _is_open(one.thing) else 1
        key = (one.thing.name, one.colour, None if merged else at)
        counts[key] = counts.get(key, 0) + (one.thing.count or open_count)
    groups = [
        Group(object=str(n), colour=c if isinstance(c, str) else None, count=k) for (n, c, _), k in counts.items()
    ]
    fits = all(group.count <= v.MAX_COUNT for group in groups) and sum(g.count for g in groups) <= v.MAX_SPRITES
    return tuple(groups) if fits else None
