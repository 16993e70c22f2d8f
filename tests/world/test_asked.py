"""What a picture must show, against the scenes that prompts and instructions were made of."""

from __future__ import annotations

import random

import pytest

from mm.world import vocabulary as v
from mm.world.asked import Asked, asked_of, asked_of_change
from mm.world.asking.trained import trained
from mm.world.edits import KINDS, sample_edit


def _answers(asked: Asked | None) -> dict[str, str]:
    assert asked is not None
    return {fact.question: fact.answer for fact in asked.facts}


def test_a_prompt_in_full() -> None:
    asked = asked_of("a red cat left of a dog in the snow, sepia style")
    assert asked is not None and asked.numbers == (1, 1)
    assert _answers(asked) == {
        "is there a cat in the picture?": "yes",
        "is there a dog in the picture?": "yes",
        "what colour is the cat?": "red",
        "is the cat left of the dog?": "yes",
        "what style is this?": "sepia",
        "what is the background?": "snow",
    }


def test_what_no_question_asks_for_certain_is_left_out() -> None:
    # Two groups of cats have no one colour, neon shows no ground, and several things have no one position.
    assert _answers(asked_of("a red cat and two blue cats")) == {"is there a cat in the picture?": "yes"}
    assert "what is the background?" not in _answers(asked_of("a cat at night, neon style"))
    assert not any("left of" in question for question in _answers(asked_of("two cats left of a dog")))
    assert asked_of("a cat in a house") is None


@pytest.mark.parametrize("kind", KINDS)
def test_changes_are_read_as_they_were_made(kind: str) -> None:
    """Against the target scene of random edits in the training grammar."""
    for number in range(40):
        edit = sample_edit(random.Random(f"{kind} {number}"), kind, held_out=False)
        asked = asked_of_change(edit.instruction)
        if kind == "move":
            assert asked is None
            continue
        answers, names = _answers(asked), {s.object for s in edit.target.sprites}
        assert asked is not None and asked.numbers is None
        assert all(trained(question) == question for question in answers)
        for name in v.OBJECTS:
            said = next((a for q, a in answers.items() if f" {name} in the picture?" in q), None)
            assert said in (None, "yes" if name in names else "no")
        colours = [a for q, a in answers.items() if "colour" in q]
        assert all(any(s.colour == colour for s in edit.target.sprites) for colour in colours)
        assert len(colours) == 1 if kind == "recolour" else len(colours) <= 1
        if kind in ("restyle", "background"):
            assert list(answers.values()) == [edit.target.style if kind == "restyle" else edit.target.background]
        if kind == "replace":
            assert sorted(a for q, a in answers.items() if "in the picture?" in q) == ["no", "yes"]


def test_other_instructions_are_not_checked() -> None:
    assert asked_of_change("move the cat to the left") is None
    assert asked_of_change("<redden>") is None
