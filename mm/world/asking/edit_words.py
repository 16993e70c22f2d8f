"""Brings an instruction to change a picture into a wording that the model was trained on (`mm.world.edits`).

Design choices
- Each kind of edit is recognized by its phrases, found as in questions: "it should be blue", "could you color the cat
  blue" and "blue, please" are all "make the cat blue".
- "it" and "them" stand for the thing that was mentioned last, where it is in the picture, or for its only thing.
- An instruction of an edit verb that fits no kind goes to the model as it is; a change that cannot be made (a size, a
  rotation) is `Refused`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mm.world import vocabulary as v
from mm.world.asking.phrases import Clause, clause_of
from mm.world.asking.query import CATEGORIES, Thing
from mm.world.captions import article
from mm.world.scene import Group

_SIDES = {"left": "left", "right": "right", "top": "top", "bottom": "bottom", "up": "top", "upwards": "top"}
_SIDES |= {"down": "bottom", "downwards": "bottom"}
_VERBS = (
    r"(?:add|put|place|insert|include|remove|delete|erase|drop|get rid of|take|make|turn|paint|colou?r"
    r"|recolou?r|dye|tint|change|replace"
    r"|swap|exchange|move|shift|bring|set|switch|let|give|convert|transform|restyle|redo|render|draw|keep|use"
    r"|rotate|flip|mirror"
    r"|resize|scale|enlarge|shrink|zoom|crop|blur|sharpen|brighten|darken)"
)
_CANNOT = (
    r"\b(?:bigger|smaller|larger|taller|thinner|wider|huge|tiny|rotate|rotated|flip|mirror|resize|scale|enlarge"
    r"|shrink|zoom|crop"
    r"|blur|sharpen|brighten|darken|upside down|transparent)\b"
)
CANNOT = (
    "I cannot change sizes, turn things or filter a picture. I can recolour, add, remove, replace and move things, and "
    "change the style or the background."
)
_REMOVE = r"^(?:remove|delete|erase|drop|get rid of|take (?:away|out|off)|take|lose|without|no more)\b"


@dataclass(frozen=True, kw_only=True)
class Change:
    """An instruction for the model.

    Attributes:
        words: The instruction.
        target: The thing in the picture that it changes; None for the style, the background and what is added.
        topic: What "it" stands for from now on.
    """

    words: str
    target: str | None = None
    topic: str | None = None


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A change that the model cannot make; `reply` says so."""

    reply: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the picture shows, as far as it is known, and the thing that was mentioned last."""

    groups: Sequence[Group] = ()
    topic: str | None = None

    def pronoun(self, plural: bool) -> tuple[str, int] | None:
        """The object that "it" or "them" stands for, and its number; None where that is open."""
        numbers: dict[str, int] = {}
        for group in self.groups:
            numbers[group.object] = numbers.get(group.object, 0) + group.count
        several = [name for name, number in numbers.items() if number > 1]
        if self.topic in numbers and not (plural and several and numbers[str(self.topic)] == 1):
            return str(self.topic), numbers[str(self.topic)]
        if plural and len(several) == 1:
            return several[0], numbers[several[0]]
        if numbers and (len(numbers) == 1 or not plural):
            name = next(iter(numbers))
            return name, numbers[name]
        return None


def is_edit(line: str) -> bool:
    """Whether a line is worded as a change: it begins with a verb of change, or says how something should be."""
    return bool(
        re.match(rf"{_VERBS}\b|without\b|no more\b", line)
        or re.search(
            r"\b(?:should|must|shall|ought to) (?:be|go|stand|look|have|not)\b|\b(?:want|like) (?:it|them|this"
            r"|the \w+)\b",
            line,
        )
        or re.fullmatch(r"(?:in|as|at|on|under|by|against)\b.*|(?:it|them|this)? ?(?:but )?(?:in|at|on)\b.*", line)
        or re.fullmatch(r"(?:and |also |but |with )+(?:an?|one|another)\b.*", line)
        or re.fullmatch(r"(?:now |then |but )*(?:in )?(?:" + "|".join(v.COLOURS) + r")(?: instead| now)?", line)
    )


def change_of(line: str, seen: Seen, extra: frozenset[str] = frozenset()) -> Change | Refused:
    """An instruction in trained words.

    Args:
        line: In lower case, without marks and polite openings.
        seen: What the picture shows.
        extra: Names that the model was given after its training.
    """
    if re.search(_CANNOT, line):
        return Refused(reply=CANNOT)
    found = clause_of(re.sub(r"\b(?:the )?colou?r of\b|\bcolou?rs?\b(?= (?:to|into|be))", "", line), extra)
    for rule in (_restyle, _ground, _of_many, _remove, _replace, _add, _recolour, _move):
        change = rule(line, found, seen)
        if change is not None:
            return change
    return Change(words=line, topic=found.things[0].name if found.things else None)


def _target(found: Clause, seen: Seen, line: str) -> tuple[str, str] | None:
    """The thing that an instruction names or means, and how it is written ("the cats")."""
    if found.things and found.things[0].name not in CATEGORIES:
        thing = found.things[0]
        noun = v.PLURALS.get(thing.name, thing.name) if thing.plural else thing.name
        return thing.name, " ".join(filter(None, ("the", thing.colour, noun)))
    plural = re.search(r"\b(?:them|they|these|those|all|everything)\b", line) is not None
    meant = seen.pronoun(plural)
    if meant is None:
        return None
    return meant[0], f"the {v.plural(meant[0], meant[1])}"


def _restyle(line: str, found: Clause, seen: Seen) -> Change | None:
    if len(found.styles) != 1 or found.things:
        return None
    return Change(words=f"make it {found.styles[0]} style", topic=seen.topic)


def _ground(line: str, found: Clause, seen: Seen) -> Change | None:
    if len(found.grounds) != 1 or re.match(r"(?:add|insert|include|remove|delete|replace)\b", line):
        return None
    if found.things and not re.match(
        r"(?:put|place|move|let|set|make|bring)\b.*\b(?:on|in|at|to|under|be)\b|.*\bshould be\b", line
    ):
        return None
    ground = "sky" if found.grounds[0] == "day" else found.grounds[0]
    return Change(words=f"change the background to {ground}", topic=seen.topic)


def _of_many(line: str, found: Clause, seen: Seen) -> Refused | None:
    """ "make them red" of a cat and a dog: the model changes one kind of thing at a time."""
    names = list(dict.fromkeys(group.object for group in seen.groups))
    named = [thing for thing in found.things if thing.name not in CATEGORIES]
    if named or len(names) < 2 or not re.search(r"\b(?:them|they|these|those|all|everything|both)\b", line):
        return None
    if re.search(r"\b(?:them|they|these|those)\b", line) and seen.pronoun(True) is not None:
        return None
    which = " or ".join(f"the {name}" for name in names)
    return Refused(reply=f"I change one kind of thing at a time: {which}?")


def _remove(line: str, found: Clause, seen: Seen) -> Change | None:
    away = re.match(r"take\b.*\b(?:away|out|off)$", line) or re.search(r"\bshould (?:go|not be|disappear|vanish)", line)
    if not (re.match(_REMOVE, line) or away) or found.grounds:
        return None
    target = _target(found, seen, line)
    return None if target is None else Change(words=f"remove {target[1]}", target=target[0])


def _noun(thing: Thing) -> str:
    """A new thing as an instruction names it."""
    noun = thing.name if not thing.plural else v.PLURALS.get(thing.name, thing.name)
    rest = " ".join(filter(None, (thing.colour, noun)))
    numbers = ("no", "one", "two", "three", "four")
    if thing.count is not None and 1 < thing.count < len(numbers):
        return f"{numbers[thing.count]} {rest}"
    return rest if thing.plural and thing.count != 1 else f"{article(rest)} {rest}"


def _replace(line: str, found: Clause, seen: Seen) -> Change | None:
    named = re.match(r"(?:replace|swap|exchange|substitute)\b", line) or (
        re.match(r"(?:turn|change|make|transform|convert|let)\b", line)
        and re.search(r"\binto\b|\b(?:it|them|this|N) (?:be )?an?\b", line)
    )
    things = found.things
    if not named or not things or found.relations or things[-1].name in CATEGORIES:
        return None
    target = _target(found, seen, line) if len(things) > 1 else _target(Clause(), seen, line)
    if target is None or len(things) > 2:
        return None
    new = things[-1]
    return Change(words=f"replace {target[1]} with {_noun(new)}", target=target[0], topic=new.name)


def _add(line: str, found: Clause, seen: Seen) -> Change | None:
    verb = re.match(r"(?:add|insert|include|put|place|draw|give|bring)\b|(?:and|also|with|but)\b", line)
    if not verb or not found.things or found.things[0].name in CATEGORIES:
        return None
    new = found.things[0]
    noun = f"(?:{re.escape(new.name)}|{v.PLURALS.get(new.name, '-')})"
    begins = re.match(rf"(?:\w+ )+?(?:the|this|that|those|these|it|them) (?:\w+ )?{noun}\b", line)
    if begins and verb[0] not in ("add", "insert", "include"):
        return None  # "put the cat on the left" moves what is there
    if found.relations:
        anchor = _target(Clause(things=found.things[1:]), seen, line)
        if anchor is None:
            return None
        words = f"add {_noun(new)} {found.relations[0]} {anchor[1]}"
        return Change(words=words, target=anchor[0], topic=new.name)
    if len(found.things) > 1:
        return None
    return Change(words=f"add {_noun(new)}", topic=new.name)


def _recolour(line: str, found: Clause, seen: Seen) -> Change | None:
    if len(found.colours) != 1 or len(found.things) > 1 or found.colours[0] not in v.COLOURS:
        return None
    target = _target(found, seen, line)
    return (
        None
        if target is None
        else Change(words=f"make {target[1]} {found.colours[0]}", target=target[0], topic=target[0])
    )


def _move(line: str, found: Clause, seen: Seen) -> Change | None:
    side = next((_SIDES[word] for word in line.split() if word in _SIDES), None)
    if (
        side is None
        or found.relations
        or len(found.things) > 1
        or not re.match(r"(?:move|shift|put|place|bring|set)\b", line)
    ):
        return None
    target = _target(found, seen, line)
    return (
        None if target is None else Change(words=f"move {target[1]} to the {side}", target=target[0], topic=target[0])
    )
