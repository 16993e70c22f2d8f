"""Instructions to `mm edit` and its pipeline: brought into a trained wording, with what of them cannot be done.

Design choices
- What Talk makes of a change (`mm.world.asking.edit_words`) is used here as well, so that an instruction means the same
  in both. One whose colour, thing, place or style the model lacks is `partial`: the caller says so, or refuses
  it. Words that only describe ("a cute dog") are left out and named.
- An instruction in a trained wording is passed on as it is, and so is one with an added word ("<redden>") that an
  adapter has learned as an instruction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from mm.world import captions as c
from mm.world import lexicon
from mm.world import vocabulary as v
from mm.world.asking.edit_words import CANNOT, Change, Refused, Seen, change_of, steps_of
from mm.world.asking.intents import plain_line
from mm.world.asking.phrases import clause_of
from mm.world.lexicon_tables import tables
from mm.world.lexicon_why import PLACES_IN_PICTURE

NOTHING_SEEN = "the model sees nothing in the picture that it knows; name the thing that is to be changed"
CAN_CHANGE = (
    "an instruction recolours, adds, removes, replaces or moves one thing, or changes the style or the background, as "
    'in "make the cat blue" (`mm words --task edit` lists more)'
)


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """An instruction as it was read.

    Attributes:
        words: For the model.
        corrections: Misspelled words, as notices.
        problems: A line for each word that is left out, or for why the instruction cannot be carried out as a whole.
        partial: Whether it cannot be carried out as a whole.
        target: The thing in the picture that it changes; None for the style, the background and what is added.
        open: Whether it speaks of "it", which only the picture can tell.
    """

    words: str
    corrections: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    partial: bool = False
    target: str | None = None
    open: bool = False


def read_instruction(text: str, names: Iterable[str] = (), seen: Seen | None = None) -> Instruction:
    """Reads an instruction.

    Args:
        text: In any wording.
        names: Words that were added to the model, such as "<mug>".
        seen: What the picture shows, for "it"; None where that is not known.
    """
    own = frozenset(names)
    learnt = own | lexicon.HELD_OUT  # an adapter may know these
    found = lexicon.read(text, "edit", own)
    said = tuple(f"{word!r} was read as {other!r}" for word, other in found.corrections)
    if is_trained(found.text) and not found.problems:
        change = change_of(plain_line(found.text), Seen(), learnt)
        return Instruction(words=found.text, corrections=said, target=getattr(change, "target", None))
    line = plain_line(found.text)
    if len(steps := steps_of(line)) > 1:
        several = f"it asks for {len(steps)} changes; give one at a time: {'; '.join(map(repr, steps))}"
        return Instruction(words=found.text, corrections=said, problems=(several,), partial=True)
    change = change_of(line, seen or Seen(), learnt)
    unknown = {word for word, _ in clause_of(plain_line(text), own).unknown}
    left_out = tuple(why for word, why in found.unknown.items() if word in unknown)
    excluded = tuple(why for word, why in found.unknown.items() if _is_excluded(word))
    if _has_own_words(found.text, own, change):
        return Instruction(words=found.text, corrections=said, problems=left_out)
    if isinstance(change, Change) and not excluded:
        return Instruction(words=change.words, corrections=said, problems=left_out, target=change.target)
    if seen is None and re.search(r"\b(?:it|them|they|this|these|those)\b", line) and not left_out:
        return Instruction(words=found.text, corrections=said, open=True)
    if seen is not None and not seen.groups:
        return Instruction(words=found.text, corrections=said, problems=(NOTHING_SEEN,), partial=True)
    lacking = tuple(why for word, why in found.unknown.items() if _is_lacking(word))
    why = excluded or lacking or left_out or (CAN_CHANGE,)
    if isinstance(change, Refused) and change.reply == CANNOT:
        why = (f"sizes and directions cannot be changed, and nothing is filtered; {CAN_CHANGE}",)
    return Instruction(words=found.text, corrections=said, problems=why, partial=True)


def _has_own_words(text: str, names: frozenset[str], change: object) -> bool:
    """Whether an instruction holds an added word for what an adapter does, which is no thing of a known change."""
    made = change.words if isinstance(change, Change) else ""
    return any(name in text.lower() and name not in made for name in names)


def _is_lacking(word: str) -> bool:
    return tables("edit").lacks(word) or word in PLACES_IN_PICTURE


def _is_excluded(word: str) -> bool:
    """Whether a word turns an instruction into another: a negation, or more than a picture holds."""
    table = tables("edit")
    return word.isdigit() or (word,) in table.many or (word,) in table.negation


def is_trained(text: str) -> bool:
    """Whether an instruction is worded as in training (`mm.world.edits`)."""
    return _trained().fullmatch(text.lower().strip()) is not None


@cache
def _trained() -> re.Pattern[str]:
    def one_of(words: Iterable[str]) -> str:
        return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"

    names = one_of([*v.OBJECTS, *(v.PLURALS[name] for name in v.OBJECTS)])
    colour, style, ground = one_of(v.COLOURS), one_of(v.STYLES), one_of(v.BACKGROUNDS)
    the, new = f"the {names}", f"(?:an? )?(?:{colour} )?{names}"
    relation, side = one_of(v.RELATIONS), "(?:left|right|top|bottom)"
    placed = one_of(choices[0] for choices in c.BACKGROUND_PHRASES.values())
    return re.compile(
        rf"(?:make|turn|paint) {the} {colour}|change the colour of {the} to {colour}|(?:remove|delete|erase) {the}"
        rf"|take {the} away|(?:add|put|draw) {new}(?: {relation} the {names})?|put {new} here|draw {new} in the picture"
        rf"|(?:replace {the} with|(?:turn|change) {the} into|swap {the} for) {new}"
        rf"|(?:make it|turn it into|in) {style} style|change the style to {style}"
        rf"|(?:change|set) the background to {ground}|make the background {ground}"
        rf"|put it {placed}|(?:move|shift) {the} to the {side}|put {the} on the {side}"
    )
