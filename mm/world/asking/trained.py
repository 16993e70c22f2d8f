"""The questions that the model was trained on (`mm.world.questions`), and how each kind is asked.

Design choices
- A question in a trained wording goes to the model as it is. Every other is put into the first wording of its kind.
"""

from __future__ import annotations

import re

from mm.world import vocabulary as v
from mm.world.captions import article
from mm.world.words import split

DESCRIBE = "describe the picture"
STYLE, BACKGROUND = "what style is this?", "what is the background?"
_NOUN = "(?:" + "|".join(map(re.escape, v.ALL_OBJECTS)) + ")"
_NOUNS = "(?:" + "|".join(map(re.escape, [*v.PLURALS.values(), *v.CATEGORIES])) + ")"
_RELATION = "(?:" + "|".join(v.RELATIONS) + ")"
_TRAINED = re.compile(
    rf"is there an? {_NOUN} in the picture \?|can you see an? {_NOUN} \?|does the picture show an? {_NOUN} \?"
    rf"|how many {_NOUNS} are there \?|how many {_NOUNS} can you see \?|what is the number of {_NOUNS} \?"
    rf"|what colour is the {_NOUN} \?|what colour are the {_NOUNS} \?|which colour do the {_NOUNS} have \?"
    rf"|is the {_NOUN} {_RELATION} the {_NOUN} \?"
    r"|what style is this \?|what is the style of the picture \?|which style is the picture in \?"
    r"|what is the background \?|what is in the background \?|which background is this \?"
    r"|describe the picture|describe the image|describe it|what do you see \?|what does the picture show \?"
)


def trained(text: str) -> str | None:
    """The question as the model was trained on it, with a question mark where that is missing; else None."""
    words = " ".join(split(text))
    for asked, line in ((text, words), (f"{text.strip()}?", f"{words} ?")):
        if _TRAINED.fullmatch(line):
            return asked
    return None


def existence(name: str) -> str:
    """Whether the picture shows an object."""
    return f"is there {article(name)} {name} in the picture?"


def count(name: str) -> str:
    """How many of an object, or of a category that the model was trained to count."""
    return f"how many {v.PLURALS.get(name, name)} are there?"


def colour(name: str, number: int) -> str:
    """The colour of a thing or of several."""
    return f"what colour is the {name}?" if number == 1 else f"what colour are the {v.PLURALS.get(name, name)}?"


def position(first: str, relation: str, second: str) -> str:
    """Whether `first` stands in `relation` to `second`."""
    return f"is the {first} {relation} the {second}?"
