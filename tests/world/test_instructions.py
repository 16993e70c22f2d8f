"""Instructions in any wording: what the model gets, what is left out aloud, what is refused."""

from __future__ import annotations

import random

import pytest

from mm.world.asking.edit_words import Seen
from mm.world.asking.instructions import NOTHING_SEEN, Instruction, is_trained, read_instruction
from mm.world.edits import sample_edit
from mm.world.scene import Group

READ = {
    "it should be blue": None,
    "color the kitty blue": "paint the cat blue",
    "the cat should be red": "make the cat red",
    "cat blue": "make the cat blue",
    "remove the background": "change the background to plain",
    "make it daytime": "change the background to sky",
    "at night": "change the background to night",
    "give me a dog": "add a dog",
    "set background to beach": "change the background to beach",
    "swap the cat with a dog": "replace the cat with a dog",
}
LEFT_OUT = {"add a cute dog": ("add a dog", "'cute' (mood)"), "add a panda": ("add a panda", "'panda'; nearest: bear")}
REFUSED = {
    "make the cat black": "a colour that it lacks; nearest: blue, purple",
    "make the cat happy": "'happy' (mood)",
    "add a hat": "'hat'; nearest: crown, umbrella",
    "turn the cat into a lion": "'lion'; nearest: cat, tiger",
    "put the cat in a forest": "'forest', a place that it cannot draw; nearest: grass",
    "make it anime style": "'anime' (style); styles: cartoon, pixel art",
    "move the cat to the center": "a place in the picture cannot be asked for",
    "make the dog bigger": "'bigger' (size)",
    "crop it": "sizes and directions cannot be changed",
    "don't remove the cat": "what is negated may be changed as well",
    "add five stars": "at most four things of a kind",
    "make the background pink": "an instruction recolours, adds",
    "make the cat blue and remove the dog": "it asks for 2 changes; give one at a time: 'make the cat blue'; 'remove",
    "add a dog behind the cat": "things stand beside, above or below",
    "hello": "'hello'",
}


def test_trained_instructions_are_passed_on_as_they_are() -> None:
    rng = random.Random(2)
    for _ in range(400):
        words = sample_edit(rng).instruction
        read = read_instruction(words)
        assert is_trained(words) and read == Instruction(words=words, target=read.target)


@pytest.mark.parametrize(("text", "wanted"), READ.items())
def test_other_wordings_become_trained_ones(text: str, wanted: str | None) -> None:
    found = read_instruction(text)
    assert (found.partial, found.problems, found.open) == (False, (), wanted is None)
    assert wanted is None or found.words == wanted


@pytest.mark.parametrize(("text", "wanted"), LEFT_OUT.items())
def test_words_that_only_describe_are_left_out_aloud(text: str, wanted: tuple[str, str]) -> None:
    found = read_instruction(text)
    assert not found.partial and found.words == wanted[0] and wanted[1] in " ".join(found.problems)


@pytest.mark.parametrize(("text", "why"), REFUSED.items())
def test_what_cannot_be_carried_out_as_a_whole_is_refused(text: str, why: str) -> None:
    found = read_instruction(text)
    assert found.partial and why in "; ".join(found.problems), found.problems


def test_the_thing_that_changes_is_named() -> None:
    for text, target in (("remove the dogs", "dog"), ("paint the kitty red", "cat"), ("add a dog", None)):
        assert read_instruction(text).target == target


def test_it_is_what_the_picture_shows() -> None:
    seen = Seen(groups=(Group(object="cat", count=2),))
    assert read_instruction("make them blue", seen=seen).words == "make the cats blue"
    assert read_instruction("make it blue", seen=Seen()).problems == (NOTHING_SEEN,)
    assert read_instruction("make <mug> blue", ["<mug>"]).words == "make the <mug> blue"


@pytest.mark.parametrize("text", ["<redden>", "<flip> the cat", "<remove> the cat", "make it <flip>"])
def test_an_instruction_that_an_adapter_learned_is_passed_on(text: str) -> None:
    names = {"<redden>", "<flip>", "<remove>", "<mug>"}
    assert read_instruction(text, names) == Instruction(words=text)
    assert read_instruction("<other>", names).partial
    assert read_instruction("turn the cat into a <mug>", names).words == "replace the cat with a <mug>"
