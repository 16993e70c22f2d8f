"""Questions in any wording: what they are understood as, what is answered, and what is said where nothing is."""

from __future__ import annotations

import pytest
from asked_scenes import answer, reply

from mm.world.asking.parse import parse_question
from mm.world.asking.query import Query, Thing, Unread
from mm.world.scene import Scene, Sprite


def sprite(name: str, x: int, y: int, colour: str | None = None) -> Sprite:
    return Sprite(object=name, colour=colour, x=x, y=y, size=36)


CATS = Scene(sprites=(sprite("cat", 32, 64, "red"), sprite("cat", 96, 64, "red")), background="grass")
NIGHT = Scene(
    sprites=(sprite("dog", 28, 28), sprite("cat", 100, 28, "blue"), sprite("tree", 60, 100)), background="night"
)
NEON = Scene(sprites=(sprite("apple", 64, 64),), style="neon")
SKETCH = Scene(sprites=(sprite("cat", 64, 64),), style="sketch")


@pytest.mark.parametrize(
    ("scene", "question", "said"),
    [
        (CATS, "how many dogs are there?", "none"),
        (CATS, "How many dogs do you see", "none"),
        (CATS, "how many cats and dogs are there?", "two cats and no dogs"),
        (CATS, "count the cats", "two"),
        (CATS, "how many?", "two"),
        (CATS, "how many kinds of animals are there?", "one"),
        (CATS, "are there at least two cats?", "yes"),
        (CATS, "do you see more than two cats?", "no"),
        (CATS, "is there only one cat?", "no"),
        (CATS, "is it night?", "no"),
        (CATS, "is it day?", "yes"),
        (CATS, "isn't it night?", "no, the background is grass"),
        (CATS, "what color are the cats?", "red"),
        (CATS, "what's the cats' colour?", "red"),
        (CATS, "are the cats red?", "yes"),
        (CATS, "is the cat red?", "yes"),
        (CATS, "are the cats not red?", "no, they are red"),
        (CATS, "is the dog red?", "no, there is no dog in the picture"),
        (CATS, "what colour is the dog?", "there is no dog in the picture"),
        (CATS, "what is in the picture?", "two red cats on grass"),
        (CATS, "what's in the image?", "two red cats on grass"),
        (CATS, "is there no dog?", "yes, there is no dog in the picture"),
        (CATS, "is there no cat?", "no, there are two cats in the picture"),
        (CATS, "isn't there a dog?", "no, there is no dog in the picture"),
        (CATS, "is there neither a dog nor a bus?", "yes, the dog and the bus are absent"),
        (CATS, "are there more cats than dogs?", "yes"),
        (CATS, "which are there more of, cats or dogs?", "cats"),
        (CATS, "how many more cats than dogs are there?", "two"),
        (CATS, "what time of day is it?", "day"),
        (CATS, "are there cats on the beach?", "no"),
        (CATS, "what is on the grass?", "two red cats"),
        (CATS, "is the picture empty?", "no, there are things in the picture"),
        (CATS, "are there only cats?", "yes"),
        (CATS, "is everything red?", "yes"),
        (NIGHT, "what time of day is it?", "night"),
        (NIGHT, "is it day?", "no"),
        (NIGHT, "what animals are there?", "a blue cat and a dog"),
        (NIGHT, "what is left of the cat?", "the dog"),
        (NIGHT, "what is the cat right of?", "the dog"),
        (NIGHT, "which animals are above the tree?", "the cat and the dog"),
        (NIGHT, "does the tree have a cat above it?", "yes"),
        (NIGHT, "is the cat left or right of the dog?", "right of"),
        (NIGHT, "where is the tree?", "below the cat and below the dog, at night"),
        (NIGHT, "what colour is the dog?", "natural colours"),
        (NIGHT, "is the cat blue or green?", "blue"),
        (NIGHT, "what is blue?", "the cat"),
        (NIGHT, "is anything red?", "no"),
        (NIGHT, "how many blue things are there?", "one"),
        (NIGHT, "is there a red cat?", "no"),
        (NIGHT, "is it a cat or a bus?", "a cat"),
        (NIGHT, "is there fruit?", "no"),
        (NIGHT, "what else is there besides the dog?", "a blue cat and a tree"),
        (NIGHT, "tell me about the cat", "a blue cat"),
        (NEON, "is it neon?", "yes"),
        (NEON, "is it a sketch?", "no"),
        (NEON, "is it night?", "no background shows in neon style"),
        (SKETCH, "what colour is the cat?", "no colours show in sketch style"),
    ],
)
def test_any_wording_gets_the_right_answer(scene: Scene, question: str, said: str) -> None:
    assert reply(scene, question) == said


def test_it_is_the_topic_the_only_thing_or_everything() -> None:
    assert reply(CATS, "what colour are they?") == "red"
    assert reply(NIGHT, "what colour is it?", topic="cat") == "blue"
    assert reply(NIGHT, "is it above the tree?", topic="cat") == "yes"
    assert reply(NIGHT, "what colours are they?") == "blue, natural colours and green"
    assert "I do not know what is meant by it" in reply(NIGHT, "is it above the tree?")


@pytest.mark.parametrize(
    ("question", "why"),
    [
        ("is it a zebra?", "I do not know what a zebra is."),
        ("how many helicopters are there?", "I do not know what helicopters are."),
        ("is the cat happy?", "I do not know the word 'happy'."),
        ("who painted this?", "I do not understand this question."),
        ("is the cat next to the tree?", "I do not understand this question."),
        ("is the cat under the tree and red?", "I do not understand this question."),
        ("is the sky blue?", "I do not understand this question."),
        ("hello", "I do not understand this question."),
    ],
)
def test_what_is_not_understood_is_said_with_what_can_be_asked(question: str, why: str) -> None:
    assert isinstance(parse_question(question), Unread)
    said = reply(CATS, question)
    assert said.startswith(why)
    assert "You can ask" in said


@pytest.mark.parametrize(
    "question",
    [
        "is there a cat in the picture?", "can you see an owl?", "how many cats are there?", "describe it",
        "how many things can you see?", "what is the number of foxes?", "what colour is the cat?",
        "which colour do the cats have?", "is the cat above the dog?", "what style is this?",
        "which style is the picture in?", "what is in the background?", "what does the picture show?",
    ],
)  # fmt: skip
def test_a_trained_wording_goes_to_the_model_as_it_is(question: str) -> None:
    read = parse_question(question)
    assert isinstance(read, Query) and read.trained == question
    assert parse_question(question.upper()) == read
    other = parse_question(f"please {question}")
    assert other == read and isinstance(other, Query) and other.trained is None


def test_names_that_were_added_later_are_things() -> None:
    assert isinstance(parse_question("is there a <mug>?"), Unread)
    read = parse_question("is there a <mug>?", frozenset({"<mug>"}))
    assert isinstance(read, Query) and read.things == (Thing(name="<mug>"),)


def test_no_reply_is_empty_and_a_negated_answer_says_the_fact() -> None:
    from mm.world.asking.plans import plan, run

    read = parse_question("what style is this?")
    assert run([plan(read)], lambda _, asked: [""] * len(asked))[0].startswith("I have no answer to this.")
    with pytest.raises(ValueError, match="unknown kind of question"):
        Query(kind="smell")
    assert answer(CATS, "how many dogs are there?") == "three", "the model itself answers anything about what is absent"
