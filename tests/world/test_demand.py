"""What a prompt asks for, in any order of its words, and the order that the models were trained with."""

from __future__ import annotations

import random

import pytest

from mm.evaluation.prompts import COMPOSE, load_prompts
from mm.evaluation.wording import asks_for
from mm.world import vocabulary as v
from mm.world.captions import caption
from mm.world.demand import demand_of, in_order, is_trained
from mm.world.scene import groups, sample_scene
from mm.world.words import split

ORDERS = {
    "at night, a violin yellow": "a yellow violin at night",
    "stars, three": "three stars",
    "apple 3": "three apples",
    "a key in blue": "a blue key",
    "the moon on the left and a banana on the right": "a moon left of a banana",
    "left a clock, right a house": "a clock left of a house",
    "top moon, bottom house": "a moon above a house",
    "a dog with a penguin on the right": "a dog left of a penguin",
    "a dog with a star above it": "a dog below a star",
    "a dog and above it a star": "a dog below a star",
    "above the castle a boat": "a castle below a boat",
    "a cat on a car": "a cat above a car",
    "a cat by a tree": "a cat next to a tree",
    "a red apple and a crown, the crown blue": "a red apple and a blue crown",
    "a cat and a dog, the cat left of the dog": "a cat left of a dog",
    "pine tree, owl": "a pine and an owl",
    "an apple tree": "a tree",
    "cat dog owl": "a cat, a dog and an owl",
    "cats": "three cats",
    "cats and dogs": "two cats and two dogs",
    "two cat": "two cats",
    "mosaic, two clocks": "two clocks, mosaic style",
    "fish, tile, mosaic": "a fish, mosaic style",
    "snow: a fox": "a fox in the snow",
    "a cat and a dog with snow in the background, sepia": "a cat and a dog in the snow, sepia style",
}
UNREAD = (
    "a cat in a house", "a cat and a glorp", "a neon sketch of a cat", "a cat on the beach at night", "a red and a key",
    "a red blue cat", "a cat left of a dog above a star", "four cats and four dogs", "above a cat", "night",
)  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), ORDERS.items())
def test_words_in_any_order_become_the_trained_one(text: str, wanted: str) -> None:
    assert in_order(split(text)) == split(wanted)


@pytest.mark.parametrize("text", UNREAD)
def test_what_does_not_fit_together_is_not_read_in_part(text: str) -> None:
    assert demand_of(split(text)) is None
    assert in_order(split(text)) == split(text)


def test_captions_are_read_as_their_scenes_and_stay_as_they_are() -> None:
    rng = random.Random(5)
    for _ in range(400):
        scene = sample_scene(rng, crowd_share=0.2)
        words = split(caption(scene, rng))
        demand = demand_of(words)
        assert demand is not None and is_trained(words, demand) and in_order(words) == words, words
        assert sorted(g.count for g in demand.groups) == sorted(_merged(scene)), words
        assert demand.background in (scene.background, None)
        assert (demand.style or v.DEFAULT_STYLE) == scene.style


def _merged(scene: object) -> list[int]:
    return [group.count for group in groups(scene)]  # type: ignore[arg-type]


def test_reporting_prompts_are_read_as_what_they_demand() -> None:
    for prompt in load_prompts(COMPOSE):
        assert asks_for(demand_of(split(prompt.text)), prompt.wanted), prompt.text
