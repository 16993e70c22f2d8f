"""The words of users: what is read as the models' own words, what is corrected aloud, what is not understood."""

from __future__ import annotations

import json

import pytest

from mm.core.errors import UserError
from mm.evaluation.prompts import FOLDER
from mm.world.lexicon import read
from mm.world.lexicon_list import known_words
from mm.world.lexicon_typos import distance

SAME = {
    "a kitty": "a cat",
    "two kitties": "two cats",
    "a puppy dog": "a puppy",
    "a color photograph of a cat": "a picture of a cat",
    "please draw me a photo of two kitties": "a photo of two cats",
    "an automobile at nighttime": "a car at night",
    "a dog near a fir tree in the winter": "a dog next to a pine on a winter day",
    "🐱 and 🐶": "a cat and a dog",
    "a cat & a dog": "a cat and a dog",
    "a row of three cats": "three cats",
    "a mosaic house in mosaic": "a house, mosaic style",
    "more than three stars at night": "four stars at night",
    "at least two kitties": "two cats",
    "hey, can you draw me a tiger please": "a tiger",
    "I'd love to see a picture that shows two owls": "a picture of two owls",
    "an illustration containing a clock and a key": "a picture of a clock and a key",
    "a clock, that's all": "a clock",
    "a fox that's blue": "a blue fox",
    "a bear with red fur": "a red bear",
    "a lime green car": "a green car",
    "a deep blue bird": "a blue bird",
    "a cat whose colour is red": "a red cat",
    "3 x tomato": "three tomatoes",
    "cats (2)": "two cats",
    "three bears side by side": "three bears",
    "a dog with a cat on its left": "a dog right of a cat",
    "a cat left to a dog": "a cat left of a dog",
    "a dog to the north of a cat": "a dog above a cat",
    "a fox sitting under a tree": "a fox under a tree",
    "the bear is on top of the fox": "a bear above a fox",
    "bear, a clean white page": "a bear on a plain background",
    "a bear without any background": "a bear with a plain background",
    "a bear in front of the sea": "a bear on the beach",
    "bear under a starry sky": "a bear at night",
    "it's winter and there are two wolves": "two wolves in the snow",
    "fish made of mosaic tiles": "a fish, mosaic style",
    "technical blueprint, a boat": "a boat, blueprint style",
    "retro pixel frog": "a frog, pixel art style",
}
SAID = {
    "catt": ("a cat", "'catt' was read as 'cat'"),
    "a rde car": ("a red car", "'rde' was read as 'red'"),
    "a hat": ("a hat", "'hat'; nearest: crown, umbrella"),
    "a rainbow and a cat": ("a cat", "'rainbow'; nearest: star, moon"),
    "two mice": ("two mice", "'mice'; nearest: fox, rabbit"),
    "a cat and no dogs": ("a cat", "what is absent cannot be said to the model; 'and no dogs' is left out"),
    "no cats": ("a picture", "what is absent cannot be said"),
    "five cats": ("four cats", "at most four things of a kind; 'five' is read as 'four'"),
    "ten stars": ("four stars", "'ten' is read as 'four'"),
    "many stars": ("four stars", "'many' is read as 'four'"),
    "12 apples": ("four apples", "'12' is read as 'four'"),
    "more than four cats": ("four cats", "'more than four' is read as 'four'"),
    "at least six cats": ("four cats", "'at least six' is read as 'four'"),
    "a wolfe": ("a wolf", "'wolfe' was read as 'wolf'"),
    "a black cat": ("a cat", "'black', a colour that it lacks; nearest: blue, purple"),
    "a cat in a house": ("a cat in a house", "nothing is drawn inside other things; 'in a house'"),
    "a big cat": ("a cat", "'big' (size) and ignores it"),
    "a cat in a forest": ("a cat", "a place that it cannot draw; nearest: grass"),
    "a king": ("a king", "there are no people in its pictures"),
    "ein Hund und eine Katze im Schnee": (None, "the model reads English"),
    "猫が二匹": (None, "the model reads English"),
    "a cat, a dog, a fox, an owl and a fish": (None, "at most three kinds of things, and 5 are named (cat, dog, fox"),
    "a red hat and a cat": ("a cat", "'hat'"),
    "three rainbows and a cat": ("a cat", "'rainbows'"),
    "a dragon flying over a castle": ("a castle", "'dragon'"),
    "a rainbow in the sky": ("in the sky", "'rainbow'"),
    "a cat wearing a red hat on the beach": ("a cat on the beach", "'wearing'"),
    "a cat left of an elephant, neon style": ("a cat, neon style", "'elephant'"),
    "a cat without a hat and with a crown": ("a cat with a crown", "'without a hat' is left out"),
    "an adorable cat": ("a cat", "'adorable' (mood)"),
    "a cat riding a bicycle": ("a cat and a bicycle", "'riding' (action)"),
    "a star between two moons": ("a star and two moons", "'between'"),
    "two hundred cats": ("four cats", "'two hundred' is read as 'four'"),
    "a bus number 12": (None, "does not know the word '12'"),
    "four cats and four dogs": (None, "holds at most 6 things, and 8 are named"),
    "three cats and two dogs, pixel art style": (None, "holds at most 4 things, and 5 are named"),
    "a red cat, sketch style": ("a red cat, sketch style", "sketch style does not show the colour 'red'"),
    "a cat on the beach, neon style": (None, "neon style shows no background, so 'on the beach' is not drawn"),
    "an orange and a pine": (None, "'orange' as a colour only"),
    "...": ("...", "'...' has no words"),
    "a glorp": ("a glorp", "does not know the word 'glorp'"),
    "a bear greets a fox": ("a bear and a fox", "'greets'"),
    "a cat on the left": ("a cat", "a place in the picture cannot be asked for"),
    "a cat in the middle": (None, "a place in the picture cannot be asked for"),
    "a cat on a red background": (None, "backgrounds have no colours, so 'red background' is not drawn; sky, night"),
    "a cat, van gogh style": ("a cat", "'gogh' (style); styles: cartoon, pixel art"),
    "a cat left of a dog above a star": (None, "the words are not understood in full"),
    "a neon sketch of a cat": (None, "the words are not understood in full"),
    "a beach at night": (None, "no thing is named, so the picture may show any"),
    "a panda": ("a panda", "'panda'; nearest: bear, dog"),
}
NOTHING = (
    "a hat",
    "mice",
    "a rainbow in the sky",
    "no cats",
    "a glorp",
    "...",
    "it",
    "two",
    "a red",
    "an orange",
    "hello",
)
NOTHING += ("black", "anime style", "ein Hund und eine Katze im Schnee", "a mountain", "a picture", "猫が二匹")
SOMETHING = (
    "a hat and a cat",
    "the beach",
    "a panda",
    "a cat that is not red",
    "catt",
    "ten cats",
    "a photo of a <mug>",
)


@pytest.mark.parametrize(("text", "wanted"), SAME.items())
def test_other_words_for_the_same_are_read_in_silence(text: str, wanted: str) -> None:
    found = read(text)
    assert (found.text, found.notices) == (wanted, [])


@pytest.mark.parametrize(("text", "wanted"), SAID.items())
def test_what_is_not_understood_is_said(text: str, wanted: tuple[str | None, str]) -> None:
    found = read(text)
    assert wanted[0] is None or found.text == wanted[0]
    assert any(wanted[1] in line for line in found.notices), found.notices


@pytest.mark.parametrize("text", NOTHING)
def test_a_prompt_of_which_no_thing_is_known_says_so(text: str) -> None:
    assert read(text).nothing and read(text).problems


@pytest.mark.parametrize("text", SOMETHING)
def test_a_prompt_of_which_a_thing_is_known_can_be_drawn(text: str) -> None:
    assert not read(text, names=["<mug>"]).nothing


def test_prompts_of_the_models_own_grammar_are_passed_on_unchanged() -> None:
    prompts = [
        json.loads(line)["prompt"]
        for file in sorted(FOLDER.glob("*.jsonl"))
        if not file.name.startswith("other-words")
        for line in file.read_text().splitlines()
        if "prompt" in json.loads(line)
    ]
    assert len(prompts) > 500
    for prompt in prompts:
        found = read(prompt)
        assert (found.text, found.notices) == (prompt, [])


def test_own_captions_and_instructions_are_passed_on_unchanged() -> None:
    import random

    from mm.world.captions import caption
    from mm.world.edits import sample_edit
    from mm.world.scene import sample_scene

    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        text = caption(scene, rng)
        assert read(text).text == text and not read(text).notices, text
        edit = sample_edit(rng)
        assert read(edit.instruction, "edit").text == edit.instruction, edit.instruction


def test_real_words_are_never_corrected_and_added_names_are_known() -> None:
    assert read("a hat").corrections == read("a bat").corrections == read("a coat").corrections == []
    assert read("a <mug> on the beach", names=["<mug>"]).notices == []
    assert read("a mug").notices


def test_the_list_holds_the_whole_world() -> None:
    groups = known_words("draw")
    assert [len(groups[kind]) for kind in ("objects", "colours", "backgrounds", "styles")] == [40, 8, 6, 8]
    assert "kitty" in groups["objects"]["cat"]
    assert len(known_words("ask")["objects"]) == 48


@pytest.mark.parametrize(
    ("a", "b", "apart"), [("cat", "cat", 0), ("catt", "cat", 0.5), ("rde", "red", 0.75), ("dgo", "cat", 3)]
)
def test_distances(a: str, b: str, apart: float) -> None:
    assert distance(a, b) == apart


def test_strict_refuses_before_anything_is_drawn(cli, tmp_path) -> None:
    done = cli("generate", "a black cat", "--strict", "--seed", "1", "-o", str(tmp_path / "a.png"))
    assert done.returncode == 1
    assert "refused (strict)" in done.stderr and "a colour that it lacks" in done.stderr
    assert not (tmp_path / "a.png").exists()


def test_a_synonym_draws_the_same_picture() -> None:
    from tiny import draw, tiny_pipeline

    pipe = tiny_pipeline()
    assert (draw(pipe, "two red kitties on grass") == draw(pipe, "two red cats on grass")).all()
    with pytest.raises(UserError, match=r"refused \(strict\)"):
        draw(pipe, "a black cat", strict=True)
    with pytest.warns(UserWarning, match="'black', a colour that it lacks"):
        draw(pipe, "a black cat")


def test_a_foreign_text_is_not_corrected_word_by_word() -> None:
    found = read("ein roter Hund auf Gras")
    assert found.text == "ein roter Hund auf Gras" and not found.corrections
    assert len(found.notices) == 1 and "reads English" in found.notices[0]


def test_an_instruction_keeps_the_object_that_is_not_known() -> None:
    found = read("add a hat", "edit")
    assert found.text == "add a hat" and "'hat'" in found.problems[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("recolor the cat red", "paint the cat red"),
        ("recolour the kitty blue", "paint the cat blue"),
        ("color the cat red", "paint the cat red"),
    ],
)
def test_other_words_for_a_change_are_read_in_silence(text: str, wanted: str) -> None:
    found = read(text, "edit")
    assert (found.text, found.notices) == (wanted, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("don't remove the cat", "what is negated may be changed as well"),
        ("never move the dog", "what is negated may be changed as well"),
        ("add five dogs", "at most four things of a kind"),
        ("add 7 dogs", "at most four things of a kind"),
    ],
)
def test_an_instruction_that_asks_for_what_cannot_be_is_named(text: str, said: str) -> None:
    assert [said in line for line in read(text, "edit").problems] == [True]


def test_a_misspelled_noun_keeps_its_number() -> None:
    """One letter too many, which is no "s", at the end of each object's name leaves one of a thing."""
    from mm.world import vocabulary as v

    for name in v.OBJECTS:
        for letter in "xq":
            for word in (name, v.PLURALS[name]):
                corrections = dict(read(word + letter).corrections)
                assert corrections.get(word + letter, word) == word
