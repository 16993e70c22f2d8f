"""Wordings of replies: numbers, lists of things, and what is said where there is no answer."""

from __future__ import annotations

from collections.abc import Sequence

from mm.world import vocabulary as v
from mm.world.asking.query import CATEGORIES, Thing, Unread
from mm.world.captions import article
from mm.world.scene import Group

NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
CAN_ASK = (
    "You can ask what the picture shows, whether something is there, how many there are, which colour it has, what is "
    "left of, right of, above or below what, and for the style and the background."
)
NOT_UNDERSTOOD = f"I do not understand this question. {CAN_ASK}"
NO_ANSWER = f"I have no answer to this. {CAN_ASK}"
_READ = {"zero": 0, "none": 0, "a": 1, "an": 1} | {word: n for n, word in enumerate(NUMBERS)}


def number_in(answer: str) -> int | None:
    """The number that an answer of the model says; None where it says none."""
    return _READ.get(answer.strip(" ."))


def number_word(number: int) -> str:
    """A number as a reply says it."""
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def phrase(group: Group) -> str:
    """ "a red cat", "two owls"."""
    noun = " ".join(filter(None, (group.colour, v.plural(group.object, group.count))))
    return f"{article(noun)} {noun}" if group.count == 1 else f"{number_word(group.count)} {noun}"


def the(thing: Thing | str, number: int = 1) -> str:
    """ "the cat", "the cats"."""
    name = thing if isinstance(thing, str) else thing.name
    return f"the {name}" if number == 1 else f"the {v.PLURALS.get(name, name)}"


def listed(parts: Sequence[str], nothing: str = "none", word: str = "and") -> str:
    """ "a", "a and b", "a, b and c"; `nothing` for no part."""
    if len(parts) < 2:
        return parts[0] if parts else nothing
    return f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def no_thing(thing: Thing) -> str:
    """Says that a thing is not there."""
    words = " ".join(filter(None, (thing.colour, thing.name)))
    if thing.name in CATEGORIES:
        return f"there are no {words} in the picture"
    return f"there is no {words} in the picture"


def some_thing(thing: Thing, number: int) -> str:
    """Says that a thing is there, and how often where that is known."""
    words = " ".join(filter(None, (thing.colour, thing.name)))
    if thing.name in CATEGORIES:
        return f"there are {words} in the picture"
    several = " ".join(filter(None, (thing.colour, v.PLURALS.get(thing.name, thing.name))))
    known = f"there are {number_word(number)} {several}" if number > 1 else f"there is {article(words)} {words}"
    return f"{known} in the picture"


def unread(why: Unread) -> str:
    """Says what of a question was not understood, and what can be asked."""
    if why.word is None:
        return NOT_UNDERSTOOD
    word = why.word
    if not why.thing:
        return f"I do not know the word {word!r}. {CAN_ASK}"
    several = word.endswith("s") and not word.endswith("ss")
    what = f"{word} are" if several else f"{article(word)} {word} is"
    return f"I do not know what {what}. {CAN_ASK}"
