"""The words of a task by kind, with what is read as the same."""

from __future__ import annotations

from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.lexicon_tables import Task, tables

_EDITS = {
    "make the cat red": "colour",
    "remove the dog": "removal",
    "add a star on the left": "addition",
    "replace the car with a bus": "replacement",
    "turn it into watercolor style": "style",
    "make the background snow": "background",
    "move the cat to the right": "place",
}
_QUESTIONS = {
    "how many cats are there?": "count",
    "is there a dog?": "existence",
    "what colour is the car?": "colour",
    "is the star above the house?": "position",
    "what is in the background?": "background",
    "what style is it?": "style",
    "what is in the picture?": "description",
}


def known_words(task: Task) -> dict[str, dict[str, list[str]]]:
    """Words of a task by kind: each with other words for the same, in alphabetical order."""
    table = tables(task)
    others: dict[str, list[str]] = {}
    for word, stands_for in {**table.nouns, **table.synonyms}.items():
        if word.isascii() and word != stands_for and word not in v.PLURALS.values():
            others.setdefault(stands_for, []).append(word)
    objects = v.ALL_OBJECTS if task == "ask" else v.OBJECTS
    out: dict[str, dict[str, list[str]]] = {
        "objects": {name: sorted(others.get(name, [])) for name in objects},
        "colours": {name: sorted(others.get(name, [])) for name in v.COLOURS},
        "numbers": {words[0]: list(words[1:]) for words in c.COUNT_WORDS.values()},
        "positions": {name: [w for w in words if w != name] for name, words in c.RELATION_PHRASES.items()},
        "backgrounds": {name: list(words) for name, words in c.BACKGROUND_PHRASES.items()},
        "styles": {name: sorted(others.get(name, [])) for name in v.STYLES},
    }
    if task == "edit":
        out["changes"] = {example: [kind] for example, kind in _EDITS.items()}
    if task == "ask":
        out["questions"] = {example: [kind] for example, kind in _QUESTIONS.items()}
    return out
