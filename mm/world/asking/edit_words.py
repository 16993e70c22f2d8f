"""Brings an instruction to change a picture into a wording that the model was trained on (`mm.world.edits`).

Design choices
- Each kind of edit is recognized by its phrases, found as in questions: "it should be blue", "could you color the cat
  blue" and "blue, please" are all "make the cat blue".
- "it" and "them" stand for the thing that was mentioned last, where it is in the picture, or for its only thing.
- An instruction that fits no kind, or holds more than its kind uses, is `Refused` with what can be changed. None is
  carried out in part. `steps_of` splits several in one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mm.world import vocabulary as v
from mm.world.asking.phrases import Clause, clause_of
from mm.world.asking.query import CATEGORIES, Thing
from mm.world.captions import article
from mm.world.scene import Group

# Words of instructions that name nothing in the picture.
_EDIT_WORDS = frozenset(
    """make turn paint recolour recolor dye change remove delete erase drop rid away add put insert replace swap
    exchange move shift bring switch convert transform restyle redo render draw keep use want prefer need instead
    another more again back off go top bottom left right upwards downwards its should must be new into""".split()
)
_SIDES = {"left": "left", "right": "right", "top": "top", "bottom": "bottom", "up": "top", "upwards": "top"}
_SIDES |= {"down": "bottom", "downwards": "bottom"}
_VERBS = (
    r"(?:add|put|place|insert|include|remove|delete|erase|drop|get rid of|take|make|turn|paint|colou?r"
    r"|recolou?r|dye|tint|change|replace"
    r"|swap|exchange|move|shift|bring|set|switch|let|give|convert|transform|restyle|redo|render|draw|keep|use"
    r"|rotate|flip|mirror"
    r"|resize|scale|enlarge|shrink|zoom|crop|blur|sharpen|brighten|darken)"
)
CAN_CHANGE = (
    "I can recolour, add, remove, replace and move things, and change the style or the background, for example "
    '"make the cat blue", "add an owl above it" or "make it a sketch".'
)
_CANNOT = (
    r"\b(?:bigger|smaller|larger|taller|thinner|wider|huge|tiny|rotate|rotated|flip|mirror|resize|scale|enlarge"
    r"|shrink|zoom|crop|blur|sharpen|brighten|darken|upside down|transparent)\b"
)
CANNOT = f"I cannot change sizes, turn things or filter a picture. {CAN_CHANGE}"
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


def steps_of(line: str, *, drawn: bool = False) -> list[str]:
    """The steps of a line: "make it blue and put it in the snow" holds two.

    With `drawn`, the first step says what to draw, and only "then" and marks begin another.
    """
    words = "and then|then" if drawn else "and then|then|and also|and"
    comma = "" if drawn else r"|\s*,\s*"
    apart = rf"(?:\s*[;.]\s*|\s*,?\s*\b(?:{words})\s+{comma})(?=(?:also )?{_VERBS}\b)"
    return [part for part in re.split(apart, line) if part]


def is_edit(line: str) -> bool:
    """Whether a line is worded as a change: it begins with a verb of change, or says how something should be."""
    colours = "|".join(v.COLOURS)
    if re.match(
        rf"{_VERBS}\b|without\b|no (?:more|background)\b|(?:(?:one|two|three|another|some|a few)? ?more|fewer|less)\b",
        line,
    ):
        return not re.match(r"(?:more|draw)$", line)
    if re.search(rf"\b(?:should|must|shall|ought to)\b.*\b(?:be|go|stand|have|not|disappear|{colours})\b", line):
        return True
    if re.search(r"\b(?:want|like|prefer|need) (?:it|them|this|the \w+)\b|\binstead\b", line):
        return True
    if re.fullmatch(r"(?:in|as|at|on|under|by|against)\b.*|(?:it|them|this)? ?(?:but )?(?:in|at|on)\b.*", line):
        return True
    if re.fullmatch(r"(?:and |also |but |with )+(?:an?|one|another)\b.*", line):
        return True
    if re.fullmatch(rf"(?:can|could|may) (?:it|they|the \w+) be (?:in )?(?:{colours})", line):
        return True
    found = clause_of(line)  # "neon style", "blue", "the same at night"
    rest = set(found.words) - {
        "S",
        "G",
        "C",
        "style",
        "same",
        "the",
        "P",
        "but",
        "in",
        "it",
        "them",
        "a",
        "as",
        "background",
    }
    return not rest and not found.unknown and found.has("S", "G", "C") and not found.things


def change_of(line: str, seen: Seen, extra: frozenset[str] = frozenset()) -> Change | Refused:
    """An instruction in trained words.

    Args:
        line: In lower case, without marks and polite openings.
        seen: What the picture shows.
        extra: Names that the model was given after its training.

    Returns:
        The change, or why there is none. An instruction is never carried out in part.
    """
    line = re.sub(r"^(?:add )?(one|two|three|four|another|some) more\b", r"add \1", line)
    if re.search(_CANNOT, line):
        return Refused(reply=CANNOT)
    found = clause_of(re.sub(r"\b(?:the )?colou?rs? of\b|\bcolou?rs?\b(?= (?:to|into|be))", "", line), extra)
    for word, thing in found.unknown:
        if thing or word not in _EDIT_WORDS:
            return Refused(reply=f"I do not know {'what' if thing else 'the word'} {_named(word, thing)}. {CAN_CHANGE}")
    symbols = {word for word in found.words if word in set("NCRSGT#")}
    for rule, uses in _RULES:
        change = rule(line, found, seen)
        if isinstance(change, Refused) or (change is not None and symbols <= set(uses)):
            return change
    return Refused(reply=f"I do not understand this change. {CAN_CHANGE}")


def _named(word: str, thing: bool) -> str:
    return f"{article(word)} {word} is" if thing else repr(word)


def _target(found: Clause, seen: Seen, line: str) -> tuple[str, str] | None:
    """The thing that an instruction names or means, and how it is written ("the cats")."""
    if found.things and found.things[0].name not in CATEGORIES:
        thing = found.things[0]
        noun = v.PLURALS.get(thing.name, thing.name) if thing.plural else thing.name
        return thing.name, " ".join(filter(None, ("the", thing.colour, noun)))
    if found.has("background", "backdrop", "P", "less", "more", "not"):  # no thing is meant
        return None
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
    if found.has("background", "backdrop") and re.match(rf"{_REMOVE}|no\b", line):
        return Change(words="change the background to plain", topic=seen.topic)
    if len(found.grounds) != 1 or re.match(r"(?:add|insert|include|remove|delete)\b", line):
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
    things = found.things
    if len(things) == 2 and re.search(r"\binstead of\b", line):  # "a dog instead of the cat"
        things = [things[1], things[0]]
    elif re.match(r"(?:swap|exchange)\b.*\band\b", line):  # to change places is another wish
        return None
    named = re.match(r"(?:replace|swap|exchange|substitute)\b", line) or re.search(r"\binstead\b", line)
    if re.match(r"(?:turn|change|make|transform|convert|let)\b", line):
        named = named or re.search(r"\binto\b|\b(?:it|them|this|the \w+) (?:be )?an?\b", line)
    if not named or not things or found.relations or things[-1].name in CATEGORIES:
        return None
    target = _target(Clause(things=things[:-1]), seen, line)
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


# The rules in order, with the phrases that each uses (symbols of `mm.world.asking.phrases`).
_RULES: tuple[tuple[Callable[[str, Clause, Seen], Change | Refused | None], str], ...] = (
    (_restyle, "S"), (_ground, "GN"), (_of_many, "NC"), (_remove, "N"), (_replace, "N"), (_add, "NR"),
    (_recolour, "NC"), (_move, "N"),
)  # fmt: skip
