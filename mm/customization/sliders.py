"""Sliders: two prompts, and an adapter whose scale moves pictures along the direction between them.

Source: Gandikota et al. 2023, "Concept Sliders", arXiv 2311.12092.

Design choices
- No pictures are needed: the base draws what is trained on. A folder of pictures is used where one is given.
- `{}` in the prompts stands for a subject, so that one slider is learned on several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from mm.core.checks import check_text, texts
from mm.core.errors import UserError, shown

SUBJECT = "{}"


@dataclass(frozen=True, kw_only=True)
class SliderPrompts:
    """The prompts of a slider.

    Attributes:
        positive: what a scale above 0 moves to, for example "a red {}".
        negative: what a scale below 0 moves to, for example "a blue {}".
        neutral: what is moved; empty takes the words that both prompts share.
        subjects: what `{}` stands for, one after the other.
        strength: of a step of 1, as a multiple of the difference between the two.
    """

    positive: str
    negative: str
    neutral: str = ""
    subjects: tuple[str, ...] = ()
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "subjects", texts("subjects", self.subjects))
        for name in ("positive", "negative", "neutral"):
            check_text(name, getattr(self, name))
        for name in ("positive", "negative"):
            if not getattr(self, name).strip():
                raise UserError(f"the {name} prompt is empty; give two, such as 'a small cat' and 'a big cat'")
        if self.positive.split() == self.negative.split():
            raise UserError(f"both prompts are {shown(self.positive)}; a slider needs two that differ")
        if not isinstance(self.strength, int | float) or not 0 < self.strength < float("inf"):
            raise UserError(f"strength is {self.strength}; give a number above 0")
        if not self.middle:
            raise UserError(
                f"{shown(self.positive)} and {shown(self.negative)} share no word; give the neutral prompt too"
            )
        places = [name for name in ("positive", "negative", "middle") if SUBJECT in getattr(self, name)]
        if self.subjects and len(places) < 3:
            lost = next(n for n in ("positive", "negative", "middle") if n not in places)
            word = "neutral" if lost == "middle" else lost
            raise UserError(f"the {word} prompt {shown(getattr(self, lost))} has no {{}} for the subjects")
        if places and not self.subjects:
            raise UserError(f"the {places[0]} prompt has {{}}, and there are no subjects for it; give some")
        if any(not subject.strip() for subject in self.subjects):
            raise UserError("a subject is empty; give words such as 'cat'")

    @property
    def middle(self) -> str:
        """The neutral prompt."""
        return self.neutral.strip() or shared_words(self.positive, self.negative)

    def triples(self) -> list[tuple[str, str, str]]:
        """(neutral, positive, negative) of each subject."""
        words = (self.middle, self.positive, self.negative)
        if not self.subjects:
            return [words]
        return [tuple(word.replace(SUBJECT, s) for word in words) for s in self.subjects]  # type: ignore[misc]


def shared_words(one: str, other: str) -> str:
    """The words that two prompts have in common, in their order."""
    mine, theirs = one.split(), other.split()
    blocks = SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks()
    return " ".join(word for block in blocks for word in mine[block.a : block.a + block.size])


def prompts_of(
    positive: str, negative: str, neutral: str, subjects: Sequence[str], strength: float | None = None
) -> SliderPrompts:
    """`SliderPrompts` of loose arguments."""
    more = {} if strength is None else {"strength": float(strength)}
    given = texts("subjects", subjects)
    return SliderPrompts(positive=positive, negative=negative, neutral=neutral, subjects=given, **more)
