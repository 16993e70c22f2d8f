"""Questions and conversations on the shipped weights, in the words of people who know no grammar."""

from __future__ import annotations

import warnings

import pytest
import torch
from PIL import Image

from mm import InterleavedPipeline, TextToImagePipeline, UnderstandingPipeline
from mm.evaluation.understand import to_pictures
from mm.world.scene import Scene, Sprite

CATS = Scene(
    sprites=tuple(Sprite(object="cat", colour="red", x=x, y=64, size=44) for x in (32, 96)), background="grass"
)
MIXED = Scene(
    sprites=(
        Sprite(object="owl", colour="blue", x=96, y=32, size=44),
        Sprite(object="tree", x=32, y=96, size=44),
    ),
    background="night",
)


ANSWERS: dict[str, dict[str, str]] = {
    "cats": {
        "how many dogs are there?": "none",
        "how many cats are there?": "two",
        "count the cats": "two",
        "is it night?": "no",
        "is it day?": "yes",
        "what color are the cats?": "red",
        "is the cat red?": "yes",
        "are the cats blue?": "no",
        "what is in the picture?": "two red cats on grass",
        "what's in the image?": "two red cats on grass",
        "is there no dog?": "yes, there is no dog in the picture",
        "what colour is the dog?": "there is no dog in the picture",
        "are there more cats than dogs?": "yes",
    },
    "mixed": {
        "is it night?": "yes",
        "is it day?": "no",
        "what time of day is it?": "night",
        "what animals are there?": "a blue owl",
        "name the colours": "blue and green",
        "which is left of the owl?": "the tree",
        "what is above the tree?": "the owl",
    },
}


@pytest.fixture(scope="module")
def talker() -> InterleavedPipeline:
    pipe = InterleavedPipeline.from_pretrained("mm-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def reader(talker: InterleavedPipeline) -> UnderstandingPipeline:
    names = ("text_tokenizer", "trunk", "understanding_encoder", "understanding_connector")
    return UnderstandingPipeline(**{name: getattr(talker, name) for name in names})


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    return dict(zip(("cats", "mixed"), to_pictures([CATS, MIXED]), strict=True))


def test_questions_in_any_wording(reader, pictures) -> None:
    for name, answers in ANSWERS.items():
        said = reader.answer([pictures[name]] * len(answers), list(answers))
        assert dict(zip(answers, said, strict=True)) == answers


def test_trained_questions_get_the_models_own_answers(reader, pictures) -> None:
    asked = {
        "cats": (
            "how many cats can you see?",
            "what colour are the cats?",
            "does the picture show a cat?",
            "describe it",
        ),
        "mixed": ("is the owl above the tree?", "which style is the picture in?", "how many animals are there?"),
    }
    for name, questions in asked.items():
        several = [pictures[name]] * len(questions)
        assert reader.answer(several, questions) == reader.model_answers(several, questions)
    assert reader.describe([pictures["cats"]]) == reader.model_answers([pictures["cats"]], ["describe the picture"])


def test_what_is_not_understood_is_answered_honestly_with_a_warning(reader, pictures) -> None:
    with pytest.warns(
        UserWarning, match="'is it a zebra\\?' is not understood: the model does not know the word 'zebra'"
    ):
        (said,) = reader.answer([pictures["cats"]], ["is it a zebra?"])
    assert said.startswith("I do not know what a zebra is. You can ask")
    with pytest.warns(UserWarning, match="catt"):
        assert reader.answer([pictures["cats"]], ["what colour is the catt?"]) == ["red"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reader.answer([pictures["cats"]], ["is there a kitty?"]) == ["yes"]
        assert reader.answer([pictures["cats"]], ["I wonder whether there really are any cats"]) == ["yes"]


def test_a_long_conversation_draws_changes_answers_and_talks(talker) -> None:
    state = talker.start()

    def turn(words: str) -> tuple[str, Image.Image | None]:
        events = list(talker.turn(state, words, seed=7, steps=6))
        return " ".join(e.word for e in events if e.kind == "word"), next(
            (e.picture for e in events if e.picture), None
        )

    said, drawn = turn("hello, who are you?")
    assert "I am mm" in said and drawn is None
    assert turn("make it blue") == ("There is no picture yet. What can I draw for you?", None)
    assert turn("draw a red cat on grass")[1] is not None
    assert turn("thank you") == ("You are welcome!", None)
    for question, answer in (("is there no cat?", "no, there is a cat in the picture"), ("what colour is it?", "red")):
        assert turn(question) == (answer, None)
    assert turn("now make it blue")[1] is not None
    assert turn("is the cat blue?") == ("yes", None)
    before = turn("undo")[1]
    assert before is not None and turn("what color is the cat?") == ("red", None)
    assert turn("make the dog red") == ("There is no dog in the picture, so nothing was changed.", None)
    for _ in range(6):
        assert turn("how many cats are there?") == ("one", None)
    parts = {n: p for n, p in talker.components.items() if not n.startswith("understanding") and n != "latent_stem"}
    alone = TextToImagePipeline(**parts)
    alone.set_progress_bar_config(disable=True)
    drawn = turn("draw a tree at night")[1]
    seed = 7 + state.pictures - 1
    options = {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": 6}
    wanted = alone("a tree at night", guidance_scale=talker.default_guidance[0], **options).images[0]
    assert drawn is not None and drawn.tobytes() == wanted.tobytes()
    assert turn("is there a cat?") == ("no", None)
