"""What is asked of pictures drawn apart: words, stand-ins, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from subject_adapters import adapter_of
from subject_pictures import WORDS
from tiny_pipelines import tiny_pipeline_of

from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.customization import apart_base
from mm.customization.apart import draw_apart
from mm.customization.apart_base import Subjects
from mm.customization.objectives.protocol import objective_of

PROMPT = f"a {WORDS[0]} and a {WORDS[1]} on grass"


@pytest.mark.parametrize(
    ("prompt", "more", "wanted"),
    [
        ("a cat", {}, "no adapter's word is in the prompt 'a cat'"),
        (f"a {WORDS[0]} and a {WORDS[0]}", {}, f"{WORDS[0]} is in the prompt .* more than once"),
        (PROMPT, {"stand_ins": {"mug": "cup"}}, "'cup' is to stand in for 'mug', which is no word"),
        (PROMPT, {"stand_ins": {WORDS[0]: 3}}, f"the stand-in of {WORDS[0]} is 3; give a text"),
        (
            PROMPT,
            {"stand_ins": {WORDS[0]: f"a {WORDS[1]}"}},
            f"'a {WORDS[1]}' is to stand in for {WORDS[0]} and is itself",
        ),
        (PROMPT, {"stand_ins": dict.fromkeys(WORDS, "cup")}, "give each word another thing"),
        (PROMPT, {"stand_ins": {WORDS[0]: "cup", WORDS[0].upper(): "cat"}}, "give each word another thing"),
        (PROMPT, {"seed": -1}, "seed is -1"),
        (PROMPT, {"output_type": "pt"}, "output_type is of no use"),
        (PROMPT, {"output_type": 1}, "output_type is of no use"),
        (PROMPT, {"latents": 1}, "latents is of no use"),
        (PROMPT, {"mode": "codes"}, "mode is 'codes'"),
    ],
)
@pytest.mark.filterwarnings("ignore:patch .* does not say")
def test_what_cannot_be_drawn_apart_is_one_error(prompt: str, more: dict[str, Any], wanted: str) -> None:
    pipe = tiny_pipeline_of("stable-diffusion")
    adapters = [adapter_of(pipe, word, k) for k, word in enumerate(WORDS)]
    with pytest.raises(UserError, match=wanted):
        draw_apart(pipe, prompt, adapters=adapters, **more)
    assert stack_of(pipe).names() == ()


def test_a_pipeline_of_source_pictures_is_refused() -> None:
    with pytest.raises(UserError, match="FluxFillPipeline draws from a source picture only"):
        draw_apart(tiny_pipeline_of("flux-fill"), PROMPT)


def test_stand_ins_take_their_article() -> None:
    asked = Subjects(prompt="An <owl> and a <mug> of <tea>", words=("<owl>", "<mug>", "<tea>"), seed=0)
    assert asked.prompt_with({"<owl>": "car", "<mug>": "apple"}) == "a car and an apple of <tea>"
    assert asked.prompt_with({"<tea>": "ink"}) == "An <owl> and a <mug> of ink"


def test_an_adapter_that_does_not_act_cannot_draw_its_subject() -> None:
    pipe = tiny_pipeline_of("stable-diffusion")
    for k, word in enumerate(WORDS):
        adapter_of(pipe, word, k).apply(pipe, float(k))
    with pytest.raises(
        UserError, match=f"'adapter-{WORDS[0]}' has a scale of 0, so that {WORDS[0]} would not be drawn"
    ):
        draw_apart(pipe, PROMPT)


def test_words_of_stand_ins_count_in_any_case() -> None:
    assert Subjects(prompt=PROMPT, words=WORDS, seed=0, stand_ins={WORDS[0].upper(): "cup"}).stand_ins == {
        WORDS[0]: "cup"
    }


def test_a_thing_that_the_prompt_has_several_of_does_not_stand_in() -> None:
    """ "two dogs and a <mug>" with a dog in the place of <mug> would have three dogs."""
    pipe = tiny_pipeline_of("stable-diffusion")
    objective = objective_of(pipe)
    rest = ", ".join(f"two {noun}s" for noun in objective.known_nouns() if noun not in ("cup", "cherry"))
    asked = Subjects(prompt=f"{rest} and a {WORDS[0]}", words=WORDS, seed=0)
    with pytest.raises(UserError, match=r"2 known things would be needed .* and 1 is left"):
        apart_base.things_of(objective, asked, 0)
