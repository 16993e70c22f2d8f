"""The tables of `lexicon.toml` as dictionaries, one set for each task.

Design choices
- What the models understand comes from `mm.world.vocabulary` and `mm.world.captions`; the file adds what people write
  instead, and what the world lacks.
- Plurals are formed here, so that the file holds singulars only.
- A word is in one table only for each task: the synonym wins over the lists of what the world lacks.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.demand_symbols import nouns as all_nouns
from mm.world.words import WORDS, split

Task = Literal["draw", "edit", "ask", "talk"]
TASKS: tuple[Task, ...] = ("draw", "edit", "ask", "talk")
Phrase = tuple[str, ...]
FILE = Path(__file__).with_name("lexicon.toml")
REAL_WORDS = Path(__file__).with_name("lexicon_real_words.txt")


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is known of one task's words. All words are in lower case.

    Attributes:
        known: Words that the model was trained with in this task.
        companions: Known words that need one of these words in the same text.
        synonyms: Other words, and the known word that each stands for.
        phrases: Several words, and what they are replaced with.
        shades: Words that are left out before a colour.
        postures: Words that are left out before one that places.
        scenery: Words that are left out before the name of a background.
        parts: Words that are left out behind a colour.
        flavours: Words that are left out where a style is named.
        nouns: Words for objects of the world, with the object's name.
        near: Words for things that the world lacks, with the nearest things that it has.
        kinds: Words that no picture shows, with the kind: "colour", "size", "mood", ...
        colours: Colours that the world lacks, with the nearest ones.
        places: Places that the world lacks, with the nearest background.
        bindings: Phrases that bind two things as the world cannot.
        many: Phrases for five and more.
        negation: Phrases that say what is absent.
        fillers: Words without content.
    """

    known: frozenset[str]
    companions: Mapping[str, frozenset[str]]
    synonyms: Mapping[str, str]
    phrases: Mapping[Phrase, Phrase]
    shades: frozenset[str]
    postures: frozenset[str]
    scenery: frozenset[str]
    parts: frozenset[str]
    flavours: frozenset[str]
    nouns: Mapping[str, str]
    near: Mapping[str, tuple[str, ...]]
    kinds: Mapping[str, str]
    colours: Mapping[str, tuple[str, ...]]
    places: Mapping[str, tuple[str, ...]]
    bindings: frozenset[Phrase]
    many: frozenset[Phrase]
    negation: frozenset[Phrase]
    fillers: frozenset[str]

    def has(self, word: str) -> bool:
        """Whether any table has the word."""
        return word in self.known or word in self.synonyms or word in self.fillers or self.lacks(word)

    def lacks(self, word: str) -> bool:
        """Whether the word stands for something that the world lacks."""
        alone = (word,)
        listed = word in self.near or word in self.kinds or word in self.colours or word in self.places
        return listed or alone in self.bindings or alone in self.many or alone in self.negation


@cache
def raw() -> dict[str, Any]:
    """The file as it is."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


@cache
def real_words() -> frozenset[str]:
    """English words that are spelled almost as known ones, and so must not be taken for misspelled ones."""
    lines = REAL_WORDS.read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def plurals_of(word: str) -> tuple[str, ...]:
    """The plurals of a noun: from the file, or by the rules of English spelling."""
    given = raw()["plurals"].get(word)
    if given is not None:
        return tuple(given.split())
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (f"{word}es",)
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return (f"{word[:-1]}ies",)
    return (f"{word}s",)


@cache
def tables(task: Task) -> Tables:
    """The tables of a task."""
    file = raw()
    synonyms, nouns = _synonyms(task)
    known = _known(task)
    scene = task != "ask"
    near = _near() if scene or task == "ask" else {}
    return Tables(
        known=known,
        companions={word: frozenset(others.split()) for word, others in file["companions"].items() if task == "draw"},
        synonyms={word: other for word, other in synonyms.items() if word not in known},
        phrases=_phrases(task),
        shades=_fillers("shades", task),
        postures=_fillers("postures", task),
        scenery=_fillers("scenery", task),
        parts=_fillers("parts", task),
        flavours=_fillers("flavours", task),
        nouns=nouns,
        near={word: hints for word, hints in near.items() if word not in known},
        kinds={w: kind for kind, words in file["cannot"].items() for w in words.split() if w not in known},
        colours={word: _hints(near) for near, words in file["colours"].items() for word in words.split()},
        places={word: (near,) for near, words in file["places"].items() for word in words.split()},
        bindings=_texts("bindings"),
        many=_texts("many"),
        negation=_texts("negation"),
        fillers=_fillers("words", task) - known,
    )


def _fillers(name: str, task: Task) -> frozenset[str]:
    return frozenset(raw()["fillers"][name].split()) if task == "draw" else frozenset()


def _known(task: Task) -> frozenset[str]:
    """Words of the task's grammar; those of a conversation are all tasks' together."""
    if task == "talk":
        own = set(raw()["grammar"]["talk"].split())
        return frozenset(own.union(*(_known(other) for other in TASKS if other != "talk")))
    phrases: list[str] = [*v.OBJECTS, *(v.PLURALS[name] for name in v.OBJECTS), *v.COLOURS, *v.BACKGROUNDS, *v.STYLES]
    phrases += [word for pair in v.SYNONYMS.values() for word in pair]
    for table in (c.COUNT_WORDS, c.BACKGROUND_PHRASES, c.STYLE_BEFORE, c.RELATION_PHRASES):
        phrases += [phrase for choices in table.values() for phrase in choices]
    if task == "ask":
        phrases += [*v.CATEGORIES, *v.ALL_OBJECTS, *(v.PLURALS[name] for name in v.ALL_OBJECTS)]
    words = {word for phrase in phrases for word in split(phrase)} | set(raw()["grammar"][task].split())
    return frozenset(words | set(",.?!':;-()"))


def _synonyms(task: Task) -> tuple[dict[str, str], dict[str, str]]:
    """Other words with what they stand for; and all words for objects, with the object."""
    names = v.ALL_OBJECTS if task in ("ask", "talk") else v.OBJECTS
    nouns = {word: name for word, (name, _) in all_nouns().items() if name in names}
    found: dict[str, str] = {}
    for name in v.OBJECTS:
        found |= dict.fromkeys(plurals_of(name), v.PLURALS[name])
    sections = ["synonyms", "emoji"] + [s for s in (f"synonyms_{task}",) if s in raw()]
    for section in sections:
        for canonical, words in raw()[section].items():
            for word in words.split():
                found[word] = canonical
                if canonical in v.OBJECTS and section == "synonyms":
                    found |= dict.fromkeys(plurals_of(word), v.PLURALS[canonical])
    return {word: other for word, other in found.items() if word != other}, nouns


def _near() -> dict[str, tuple[str, ...]]:
    """Words for what the world lacks, in both numbers; people have no nearest thing."""
    out: dict[str, tuple[str, ...]] = {}
    groups = [(hints, words) for hints, words in raw()["near"].items()] + [("", raw()["people"]["words"])]
    for hints, words in groups:
        for word in words.split():
            for form in (word, *plurals_of(word)):
                out.setdefault(form, _hints(hints))
    return out


def _hints(words: str) -> tuple[str, ...]:
    return tuple(word for word in words.split() if word != "none")


def _phrases(task: Task) -> dict[Phrase, Phrase]:
    scene = ["phrases_scene"] if task == "draw" else []
    own = [name for name in (f"phrases_{task}",) if name in raw()]
    return {key: value for name in ("phrases", *scene, *own) for key, value in _pairs(name).items()}


def _pairs(section: str) -> dict[Phrase, Phrase]:
    return {tuple(key.split()): tuple(value.split()) for key, value in raw()[section].items()}


def _texts(section: str) -> frozenset[Phrase]:
    """The words and the phrases of a section."""
    table = raw()[section]
    phrases = [phrase for phrase in table.get("phrases", "").split("|") if phrase.strip()]
    return frozenset((word,) for word in table["words"].split()) | frozenset(tuple(p.split()) for p in phrases)


def all_words(words: Iterable[str] = WORDS) -> frozenset[str]:
    """The whole vocabulary of the models, over all tasks."""
    return frozenset(words)
