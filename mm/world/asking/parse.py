"""Parses a question into a `Query`, whatever its wording.

Design choices
- The phrases are found first (`mm.world.asking.phrases`); then each kind of question is recognized by its operator (a
  relation, "how many", "colour", "style", ...) and by which phrases it has, the most specific kind first.
- Without any operator, things ask whether they exist: "any cats?", "do you see a cat?", "does it have a cat?".
- What is not understood is an `Unread` with the word that is not known. Nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from mm.world import vocabulary as v
from mm.world.asking.normalise import Plain, normalise
from mm.world.asking.phrases import Clause, clause_of
from mm.world.asking.query import CATEGORIES, Query, Thing, Unread
from mm.world.asking.trained import trained

_COLOUR_WORDS = ("coloured", "colored", "colour", "color", "hue", "shade", "tint", "tints")
_COLOURS_WORDS = ("colours", "colors", "hues", "shades")
_GROUND_WORDS = ("background", "backdrop", "setting", "scenery", "surroundings", "environment", "landscape", "location")
_COUNT_WORDS = ("howmany", "number", "count", "counts", "amount", "quantity", "total")
_STYLE_WORDS = ("style", "styles", "technique", "medium")
_MADE = ("drawn", "painted", "rendered", "made", "done", "created", "depicted")
_LISTS = ("what", "which", "name", "list", "enumerate", "identify", "mention", "tell", "show", "describe", "give")
_DESCRIPTIONS = ("describe", "caption", "description", "depict", "depicts", "goingon", "contents", "content", "explain")
_DESCRIPTIONS += ("summarize", "summarise", "summary", "report")
_NEGATIONS = (
    "no",
    "not",
    "without",
    "lack",
    "lacks",
    "lacking",
    "free",
    "missing",
    "absent",
    "neither",
    "never",
    "none",
)
_UNANSWERABLE = ("side", "who", "why", "when", "whose", "season", "weather", "elsewhere")
# The phrases that each kind of question can use, where they are not things alone (symbols of `phrases`).
_USES = {
    "describe": "N", "list": "NG", "exist": "NG#", "count": "NG", "colour": "NC", "is colour": "NC",
    "which colour": "NC", "position": "NR", "which": "NR", "which relation": "NR", "style": "S", "is style": "S",
    "is ground": "G", "time": "TG",
}  # fmt: skip


def parse_question(text: str, extra: frozenset[str] = frozenset()) -> Query | Unread:
    """What a question asks for.

    Args:
        text: In the user's words.
        extra: Names of things that the model was given after its training ("<mug>").

    Returns:
        The query, or what was not understood.
    """
    plain = normalise(text)
    found = clause_of(plain.text, extra)
    if found.unknown:
        word, thing = next((pair for pair in found.unknown if pair[1]), found.unknown[0])
        return Unread(word=word, thing=thing)
    query = None if found.has(*_UNANSWERABLE) else _parsed(found, plain)
    if query is None:
        return Unread()
    return replace(query, trained=trained(text), explicit=query.explicit or plain.soft)


def _parsed(found: Clause, plain: Plain) -> Query | None:
    """The first rule's query that uses all phrases; a question is never answered in part."""
    symbols = {word for word in found.words if word in set("NC#RSGT")}
    for rule in _RULES:
        query = rule(found, plain)
        if query is not None and symbols <= set(_USES.get(query.kind, "N")):
            return query
    return None


def _negated(found: Clause) -> bool:
    """Whether the question holds an odd number of negations."""
    number = sum(word in _NEGATIONS for word in found.words) + sum(thing.negated for thing in found.things)
    return number % 2 == 1 or bool(re.search(r"any (?:other )?(?:colour|color) but", found.line))


def _wh(found: Clause) -> str | None:
    """The word that asks for something other than yes or no."""
    return next((word for word in found.words if word in ("what", "which", "where", "how")), None)


def _time(found: Clause, plain: Plain) -> Query | None:
    return Query(kind="time") if found.has("T") else None


def _relation(found: Clause, plain: Plain) -> Query | None:
    if not found.relations:
        return None
    relation, at = found.relations[0], found.words.index("R")
    if found.colours or found.numbers or len(set(found.relations)) != len(found.relations):
        return None
    things = [thing for thing in found.things if thing.name not in CATEGORIES]
    kinds = [thing for thing in found.things if thing.name in CATEGORIES]
    before = sum(word == "N" for word in found.words[:at])
    if len(things) == 2 and not kinds:
        swapped = before == 2  # "does the tree have a cat above it?"
        pair = (things[1], things[0]) if swapped else (things[0], things[1])
        if len(found.relations) > 1:  # "is the cat left or right of the tree?"
            return Query(kind="which relation", things=pair, value=" ".join(found.relations))
        if found.has("howmany"):
            return Query(kind="which", things=pair, relation=relation, value="count")
        return Query(kind="position", things=pair, relation=relation, negated=_negated(found))
    if len(things) != 1 or len(found.relations) > 1:
        return None
    anchor, asked = things[0], kinds[0] if kinds else Thing(name="things")
    anchored_first = found.things[0] is anchor and before == 1  # "what is the cat left of?"
    if anchored_first:
        relation = v.OPPOSITE[relation]
    if found.has("howmany", "number", "count"):
        return Query(kind="which", things=(asked, anchor), relation=relation, value="count")
    if _wh(found) or found.has("name", "list", "tell", "identify"):
        return Query(kind="which", things=(asked, anchor), relation=relation)
    if kinds:
        return Query(kind="which", things=(asked, anchor), relation=relation, value="exist", negated=_negated(found))
    return Query(kind="position", things=(anchor,), relation=v.OPPOSITE[relation] if anchored_first else relation)


def _comparison(found: Clause, plain: Plain) -> Query | None:
    signs = {"more": "more", "outnumber": "more", "outnumbers": "more", "greater": "more", "larger": "more"}
    signs |= {"fewer": "fewer", "less": "fewer", "asmany": "same", "same": "same", "equal": "same", "equally": "same"}
    signs |= {"most": "more", "numerous": "more"}
    sign = next((signs[word] for word in found.words if word in signs), None)
    if sign is None or len(found.things) != 2:
        return None
    if found.has(*_COLOUR_WORDS, *_COLOURS_WORDS):
        return Query(kind="same colour", things=tuple(found.things), negated=_negated(found))
    if found.has("howmany"):
        return Query(kind="compare", things=tuple(found.things), value=f"{sign} by")
    if "or" in found.words or (_wh(found) and not found.has("is", "are", "do", "does")):
        return Query(kind="most", things=tuple(found.things), value=sign)
    return Query(kind="compare", things=tuple(found.things), value=sign, negated=_negated(found))


def _colour(found: Clause, plain: Plain) -> Query | None:
    if found.grounds or found.has(*_GROUND_WORDS):
        return None
    named, several = found.has(*_COLOUR_WORDS), found.has(*_COLOURS_WORDS)
    things = tuple(thing for thing in found.things if thing.name not in CATEGORIES)
    if found.colours:
        return _colour_named(found, plain, things)
    if several and found.has(*_COUNT_WORDS):
        return Query(kind="colours", value="count")
    if several and not things:
        return Query(kind="colours")
    return Query(kind="colour", things=things) if named or several else None


def _colour_named(found: Clause, plain: Plain, things: tuple[Thing, ...]) -> Query | None:
    """A question that names a colour apart from any thing."""
    wh, first = _wh(found), found.colours[0]
    if len(found.colours) > 1:  # "is the tree green or blue?"
        return Query(kind="colour", things=things) if "or" in found.words else None
    if things and not (wh == "which" and len(things) > 1):
        return Query(kind="is colour", things=things, value=first, negated=_negated(found))
    asks_of_all = not found.things and not wh and not found.has("there", "contain", "have", "has", "show", "see", "any")
    if asks_of_all:  # "is it red?"
        return Query(kind="is colour", value=first, negated=_negated(found))
    if found.has("not") and found.things:  # "is anything not red?" is another question than "is nothing red?"
        return None
    every = re.search(r"\b(?:everything|all|every)\b", plain.text) is not None
    join: Literal["none", "all", "any"] = "none" if wh else "all" if every else "any"
    how = "count" if found.has("howmany") else ""
    return Query(
        kind="which colour", things=tuple(found.things), value=first, relation=how, join=join, negated=_negated(found)
    )


def _style(found: Clause, plain: Plain) -> Query | None:
    if found.styles and not found.things:
        if _wh(found) and found.has(*_STYLE_WORDS):
            return Query(kind="style")
        return Query(kind="is style", value=found.styles[0], negated=_negated(found))
    if found.things:
        return None
    if found.has(*_STYLE_WORDS) or (found.has("how") and found.has(*_MADE)):
        return Query(kind="style")
    return Query(kind="style") if re.fullmatch(r"(?:is|was) (?:it|this|that|P) P(?: or P)*", found.line) else None


def _number(found: Clause, plain: Plain) -> Query | None:
    if not found.has(*_COUNT_WORDS):
        return None
    things = tuple(found.things) or (Thing(name="things", plural=True),)
    if found.numbers:  # "is the number of cats two?"
        things = (replace(things[0], count=found.numbers[0]),)
    if any(thing.count is not None for thing in things) and not found.has("howmany", "what", "which"):
        return Query(kind="exist", things=things, negated=_negated(found))
    how = "kinds" if found.has("kinds", "sorts", "types", "different") else ""
    return Query(kind="count", things=things, value=how, ground=_ground_of(found))


def _ground_of(found: Clause) -> str:
    return found.grounds[0] if found.grounds else ""


def _background(found: Clause, plain: Plain) -> Query | None:
    if not found.things and found.has("empty") and not found.has(*_GROUND_WORDS):
        return Query(
            kind="exist", things=(Thing(name="things", plural=True),), negated=not _negated(found), explicit=True
        )
    if found.things and not (found.has("behind") and found.has(*_LISTS)):
        if not (found.has("background", "backdrop") and all(t.name in CATEGORIES for t in found.things)):
            return None
    ground = found.has(*_GROUND_WORDS)
    if found.grounds and not _wh(found):
        return Query(kind="is ground", value=found.grounds[0], negated=_negated(found))
    if ground and found.has("empty"):
        return Query(kind="is ground", value="plain", negated=_negated(found))
    if ground or found.has("where", "behind"):
        return Query(kind="background")
    return None


def _where(found: Clause, plain: Plain) -> Query | None:
    if found.has("where") and found.things:
        return Query(kind="where", things=tuple(found.things))
    return None


def _list(found: Clause, plain: Plain) -> Query | None:
    if (
        not found.things and found.grounds and found.has("what") and not found.has(*_COLOUR_WORDS)
    ):  # "what is on the grass?"
        return Query(kind="list", things=(Thing(name="things"),), ground=_ground_of(found))
    if len(found.things) != 1 or found.things[0].name not in CATEGORIES or not found.has(*_LISTS, "N"):
        return None
    thing = found.things[0]
    if thing.name == "things" and found.has("describe", "goingon", "contents", "description", "explain"):
        return Query(kind="describe")
    if plain.text.startswith("everything"):  # "everything you see"
        return Query(kind="describe")
    wanted = found.has("what", "which", "name", "list", "enumerate", "identify", "mention", "describe")
    begins = found.words[0] in ("tell", "show", "give")
    if _negated(found) or not (wanted or begins):
        return None
    return Query(kind="list", things=(thing,), ground=_ground_of(found))


def _else(found: Clause, plain: Plain) -> Query | None:
    """ "what else is there besides the cat?", "are there only cats?", "is the cat alone?" """
    things = tuple(t for t in found.things if t.name not in CATEGORIES)
    if not things and found.has("else"):
        return Query(kind="describe")
    if len(things) != 1:
        return None
    look_of = found.has("like") and found.has("look") and _wh(found)  # "what does the cat look like?"
    if look_of or found.words[0] in ("about", "describe"):
        return Query(kind="list", things=things, value="about")
    if found.has("else", "besides", "except") or (found.has("other") and _wh(found)):
        return Query(kind="list", things=things, value="else" if _wh(found) else "exist else")
    if found.has("only", "alone"):
        return Query(kind="list", things=things, value="only") if things[0].count is None else None
    return None


def _exist(found: Clause, plain: Plain) -> Query | None:
    things = tuple(found.things)
    if not things or found.has("how", "where") or found.styles or found.has(*_STYLE_WORDS):
        return None
    negated, wh = _negated(found), _wh(found)
    if wh == "which" and "or" in found.words and len(things) > 1:
        return Query(kind="exist", things=things, join="either")
    if wh:
        return Query(kind="describe") if wh == "what" and not negated and _is_vague(things) else None
    explicit = negated or plain.soft
    if found.has("neither") or ("nor" in found.words):
        return Query(kind="exist", things=things, join="none", explicit=True)
    if len(things) > 1 and found.has("no", "lack", "lacks", "lacking", "missing", "absent", "without", "free", "none"):
        return Query(kind="exist", things=things, join="none", explicit=True)
    if len(things) > 1 and any(t.negated for t in things):  # "no cat and no dog", "no cats or dogs"
        return Query(kind="exist", things=things, join="none", explicit=True)
    if found.numbers:  # "are the cats two?"
        if len(things) > 1 or things[0].count is not None:
            return None
        things = (replace(things[0], count=found.numbers[0]),)
    join = "any" if "or" in found.words else "all"
    if join == "any" and re.match(r"(?:is|are) (?:it|this|that|they|these) |(?:(?:a|an|the) )?N\b", found.line):
        return Query(kind="exist", things=things, join="either")
    return Query(kind="exist", things=things, join=join, negated=negated, explicit=explicit, ground=_ground_of(found))  # type: ignore[arg-type]


def _is_vague(things: tuple[Thing, ...]) -> bool:
    return all(thing.name == "things" for thing in things)


def _describe(found: Clause, plain: Plain) -> Query | None:
    if found.things or found.colours or found.grounds or found.numbers:
        return None
    asked = found.has(*_DESCRIPTIONS)
    vague = found.has("what") and not found.has("how", "which", *_NEGATIONS)
    told = found.words[:1] in (["tell"], ["show"], ["say"]) or found.line in ("P", "about P", "describe")
    return Query(kind="describe") if asked or vague or told else None


_RULES: tuple[Callable[[Clause, Plain], Query | None], ...] = (
    _time, _relation, _comparison, _colour, _else, _number, _style, _where, _background, _list, _exist, _describe,
)  # fmt: skip
