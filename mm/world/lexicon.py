"""What a text says in the models' own words, and what in it no picture of the world shows.

Design choices
- A text of the models' own grammar is passed on unchanged, so that its pictures stay what they are.
- Replaced are phrases, then single words: synonyms and plurals in silence, a misspelled word aloud. Words that no
  picture shows are named and left out, and so is what a text says is absent: the models would draw it.
- A word that was added to the tokenizer ("<mug>"), or that the tokenizer has and the world lacks, is passed on: an
  adapter may know it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from mm.world import vocabulary as v
from mm.world.demand import demand_of, is_trained, names_surroundings
from mm.world.lexicon_neighbours import once, without_neighbours
from mm.world.lexicon_phrases import BOND, COUNTS, THING, TRAIT, with_articles, without_marks
from mm.world.lexicon_requests import in_one_spelling, with_plain_pages, without_request
from mm.world.lexicon_scene import SIDES, ordered, problems_of
from mm.world.lexicon_tables import Phrase, Tables, Task, real_words, tables
from mm.world.lexicon_typos import nearest
from mm.world.lexicon_why import LIST, PLACES_IN_PICTURE, why_not
from mm.world.words import WORDS, split

NOTHING_LEFT = "nothing that the model knows is left; the words are passed on as they are"
_NAME = r"<[a-z0-9_-]+>"
_MARKS = frozenset(",.;:!?()'\"-")
_JOINS = frozenset({"and", "with", ",", "or", "but"})
_ANYTHING = ("a", "picture")  # of a prompt that only says what is absent
HELD_OUT = frozenset(v.HELD_OUT_OBJECTS) | {v.PLURALS[name] for name in v.HELD_OUT_OBJECTS}
_VOCABULARY = frozenset(WORDS)


@dataclass(kw_only=True)
class Reading:
    """What was read.

    Attributes:
        text: For the model.
        corrections: Misspelled words with the words that they were read as.
        problems: A line for each thing that the model does not understand or cannot show.
        unknown: Words that are not known, each with its line of the problems.
        nothing: Whether a prompt names things, and the model knows none of them.
    """

    text: str
    corrections: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    nothing: bool = False

    @property
    def corrected(self) -> list[str]:
        """A line for each correction."""
        return [f"{word!r} was read as {other!r}" for word, other in self.corrections]

    @property
    def notices(self) -> list[str]:
        """All that a user should know."""
        return self.corrected + self.problems


def read(text: str, task: Task = "draw", names: Iterable[str] = ()) -> Reading:
    """Reads a text for a task.

    Args:
        text: In any wording.
        task: "draw", "edit", "ask" or "talk".
        names: Words that were added to the model, such as "<mug>".

    Returns:
        The text in the models' words, with what was corrected and what is not understood.
    """
    own = frozenset(names)
    table = tables(task)
    words = _split(in_one_spelling(text) if task == "draw" else text, own)
    if not any(word[0].isalnum() or word in own or word in table.synonyms for word in words):
        foreign = any(letter.isalpha() for letter in text)
        said = _foreign(text) if foreign else f"{text.strip()[:60]!r} has no words"
        return Reading(text=text, problems=[said], nothing=True)
    if not _is_english(words, task, own):
        return Reading(text=text, problems=[_foreign(text)], nothing=not _things(words, table, own))
    found = Reading(text=text)
    made = _prompt(words, table, own, found) if task == "draw" else _words(words, table, own, task, found)
    if not made:
        found.problems.append(NOTHING_LEFT)
    elif made != _split(text, own):
        found.text = re.sub(r" ([,.;:!?])", r"\1", " ".join(with_articles(made)))
    found.problems = list(dict.fromkeys(found.problems))
    if task == "draw" and not _things(made, table, own):
        found.nothing = bool(found.problems) or not names_surroundings(made)
        found.problems = found.problems or [f"no thing is named, so the picture may show any; {LIST}"]
    return found


def _things(words: list[str], table: Tables, own: frozenset[str]) -> bool:
    """Whether words name a thing that the model may know; adapters learn those that are held out."""
    return any(word in table.nouns or word in own or word in HELD_OUT for word in words)


def _words(words: list[str], table: Tables, own: frozenset[str], task: Task, found: Reading) -> list[str]:
    """Phrases, then single words in the models' own."""
    made = _phrased(words, table.phrases)
    return [word for one in _each(made, table, own, task, found) for word in one]


def _prompt(words: list[str], table: Tables, own: frozenset[str], found: Reading) -> list[str]:
    """A drawing prompt in the models' own words and order."""
    if _is_own(words):
        made = words
    else:
        made = _without_absent(with_plain_pages(without_request(words)), table, found)
        if not made:
            return list(_ANYTHING)
        made = _words(without_neighbours(_counted(made, table, found), table), table, own, "draw", found)
        made = without_marks(once(made), frozenset(table.nouns) | own)
        made, unread = ordered(made)
        exempt = own | HELD_OUT
        excused = found.problems and unread != [SIDES]
        found.problems += [] if excused or exempt & set(made) or not _things(made, table, own) else unread
    found.problems += problems_of(made, table.nouns)
    return made


def _is_own(words: list[str]) -> bool:
    """Whether the words are a caption of the models' own grammar."""
    demand = demand_of(words)
    return demand is not None and is_trained(words, demand) and not HELD_OUT & set(words)


def _foreign(text: str) -> str:
    return f"the model reads English, and most words of {text.strip()[:60]!r} are not known; {LIST}"


def _split(text: str, names: frozenset[str]) -> list[str]:
    """Words and marks, with names whole."""
    out: list[str] = []
    for part in re.split(f"({_NAME})", text.lower()):
        out += [part] if part in names else split(part.replace("\ufe0f", ""))
    return out


def _is_english(words: list[str], task: Task, names: frozenset[str]) -> bool:
    """Whether a text of three words or more has as many known words as others."""
    plain = [word for word in words if word not in names and word not in _MARKS and not word.isdigit()]
    known = [word for word in plain if tables(task).has(word) or word in _VOCABULARY or word in real_words()]
    foreign = [word for word in plain if any(letter.isalpha() and not letter.isascii() for letter in word)]
    return not (len(plain) >= 3 and 2 * len(known) < len(plain)) and 2 * len(foreign) < max(len(plain), 1)


def _longest(words: list[str], at: int, phrases: Iterable[Phrase]) -> Phrase | None:
    """The longest phrase that begins at a position."""
    longest = max(map(len, phrases), default=0)
    for length in range(min(longest, len(words) - at), 0, -1):
        if (phrase := tuple(words[at : at + length])) in phrases:
            return phrase
    return None


def _phrased(words: list[str], phrases: dict[Phrase, Phrase] | object) -> list[str]:
    """With phrases replaced; what the grammar itself says is left as it is."""
    assert isinstance(phrases, dict)
    out: list[str] = []
    at = 0
    while at < len(words):
        own = _longest(words, at, _grammar())
        hit = _longest(words, at, phrases)
        if own is not None and (hit is None or len(own) >= len(hit)):
            out += own
            at += len(own)
        elif hit is not None:
            at += len(hit)
            said_already = at < len(words) and phrases[hit][-1:] == (words[at],)  # "in mosaic" before "style"
            out += phrases[hit][: len(phrases[hit]) - said_already]
        else:
            out.append(words[at])
            at += 1
    return out


@cache
def _grammar() -> frozenset[Phrase]:
    """Phrases of several words that the models were trained with."""
    from mm.world import captions as c

    found = (c.BACKGROUND_PHRASES, c.STYLE_BEFORE, c.RELATION_PHRASES)
    phrases = {tuple(split(phrase)) for one in found for choices in one.values() for phrase in choices}
    return frozenset(phrase for phrase in phrases if len(phrase) > 1)


def _without_absent(words: list[str], table: Tables, found: Reading) -> list[str]:
    """Without what the text says is absent: from a negation to the next noun."""
    out: list[str] = []
    at = 0
    while at < len(words):
        background = _longest(words, at, table.phrases) or _longest(words, at, _grammar())
        hit = _longest(words, at, table.negation)
        if hit is None or (background is not None and len(background) > len(hit)):
            out.append(words[at])
            at += 1
            continue
        end = at + len(hit)
        while end < len(words) and not _names_thing(words[end], table) and words[end] not in (",", ".", ";"):
            end += 1
        end += end < len(words) and _names_thing(words[end], table)
        absent = " ".join(words[at:end])
        found.problems.append(f"what is absent cannot be said to the model; {absent!r} is left out")
        while out and out[-1] in _JOINS:
            out.pop()
        at = end
    return out


def _names_thing(word: str, table: Tables) -> bool:
    return word in table.nouns or word in table.near or table.synonyms.get(word) in table.nouns


def _counted(words: list[str], table: Tables, found: Reading) -> list[str]:
    """With numbers that a picture cannot hold as the largest that it can."""
    out: list[str] = []
    at = 0
    while at < len(words):
        large = words[at].isdigit() and int(words[at][:9]) > v.MAX_COUNT
        large = large and any(_names_thing(word, table) for word in words[at + 1 : at + 4])
        hit: Phrase | None = (words[at],) if large else _longest(words, at, table.many)
        if hit is not None and words[at + len(hit) : at + len(hit) + 1] and words[at + len(hit)] in COUNTS:
            at += len(hit)  # "a row of three cats" says how many
            continue
        if hit is None:
            out.append(words[at])
            at += 1
            continue
        said = [out.pop()] if out and out[-1] in COUNTS else []  # "two hundred"
        found.problems.append(
            f"a picture holds at most four things of a kind; {' '.join((*said, *hit))!r} is read as 'four'"
        )
        at += len(hit)
        out.append("four")
        if at < len(words) and words[at] == "of":
            at += 1
    return out


def _each(
    words: list[str], table: Tables, names: frozenset[str], task: Task, found: Reading
) -> Iterator[tuple[str, ...]]:
    """What each word becomes."""
    present = {table.synonyms.get(word, word) for word in words}
    for at, word in enumerate(words):
        before = words[at - 1] if at else ""
        needs = table.companions.get(word)
        if word in names or (word in table.known and (needs is None or needs & present)):
            yield (word,)
        elif word in table.fillers or table.synonyms.get(word) in table.fillers:
            yield ()
        elif word in table.synonyms:
            yield tuple(table.synonyms[word].split())
        elif not word[0].isalnum():
            yield ()
        elif task in ("ask", "talk"):
            yield _asked(word, table, found)
        else:
            yield _unknown(word, before, words[at + 1 :], table, found, task)


def _asked(word: str, table: Tables, found: Reading) -> tuple[str, ...]:
    """A word of a question: only misspelled ones are changed."""
    other = None if table.has(word) or word in _VOCABULARY else _corrected(word, table, found)
    return (word if other is None else other,)


def _unknown(word: str, before: str, after: list[str], table: Tables, found: Reading, task: Task) -> tuple[str, ...]:
    """A word that is not known: corrected, or named in a problem and, in a prompt, replaced by a mark."""
    if table.lacks(word) or word in PLACES_IN_PICTURE or (task == "edit" and word.isdigit()):
        why = why_not(word, before, table)
    elif word not in _VOCABULARY and (other := _corrected(word, table, found)) is not None:
        return (other,)
    else:
        why = f"the model does not know the word {word!r} and ignores it; {LIST}"
    found.problems.append(why)
    found.unknown[word] = why
    mark = BOND if _stands_between(before, after, table) else _mark(word, after[:1], table)
    kept = word in _VOCABULARY and word not in table.kinds and word not in table.colours and word not in table.places
    kept = kept and (task != "draw" or mark != BOND)
    if task == "draw" and not kept:
        return (mark,)
    return (word,) if kept or mark == THING else ()  # an instruction without its object is another instruction


def _stands_between(before: str, after: list[str], table: Tables) -> bool:
    """Whether a word stands between two things of the world, as a verb does: "a bear greets a fox"."""
    rest = after[1:] if after[:1] in (["a"], ["an"], ["the"]) else after
    return _names_thing(before, table) and bool(rest) and _names_thing(rest[0], table) and rest[0] not in table.near


def _mark(word: str, after: list[str], table: Tables) -> str:
    """What stands for a word that is left out of a prompt."""
    if (word,) in table.bindings or table.kinds.get(word) == "action" or word == "or":
        return BOND
    if word in table.kinds or word in table.colours:
        return TRAIT
    if not after or (word,) in table.negation:
        return THING
    adjective = after[0] in v.COLOURS or after[0] in table.colours
    adjective = adjective or table.kinds.get(after[0], "action") != "action"
    return TRAIT if _names_thing(after[0], table) or (adjective and word not in table.near) else THING


def _corrected(word: str, table: Tables, found: Reading) -> str | None:
    """The known word that a misspelled one stands for."""
    if word in real_words() or word in _VOCABULARY:
        return None
    candidates = {*table.known, *table.synonyms} - _MARKS
    other = nearest(word, candidates, lambda one: _root(one, table))
    if other is None:
        return None
    other = table.synonyms.get(other, other)
    found.corrections.append((word, other))
    return other


def _root(word: str, table: Tables) -> str:
    word = table.synonyms.get(word, word)
    return table.nouns.get(word, word)
