"""The numbers that a prompt asks for, and the prompts that do not say."""

from __future__ import annotations

import random

import pytest

from mm.world.asked import asked_numbers
from mm.world.captions import caption
from mm.world.scene import groups, sample_scene
from mm.world.vocabulary import NATURAL_COLOURS


@pytest.mark.parametrize(
    ("prompt", "numbers"),
    [
        ("three blue stars at night", (3,)),
        ("A photo of two cats", (2,)),
        ("a pair of red dogs and one owl, neon style", (2, 1)),
        ("an 8-bit picture of 3 small cars", (3,)),
        ("two kittens next to a puppy", (2, 1)),
        ("a fish and two fish", (3,)),
        ("a red cat and a blue cat", (1, 1)),
        ("a pine tree on grass", (1,)),
        ("cat left of dog", (1, 1)),
        ("cats", (3,)),
        ("cats and dogs", (2, 2)),
        ("two cat", (2,)),
        ("no cats", None),
        ("five cats", (4,)),
        ("several stars", (3,)),
        ("at night, a violin that is yellow", (1,)),
        ("a rainbow", None),
        ("four cats and four dogs", None),
    ],
)
def test_numbers_of_prompts(prompt: str, numbers: tuple[int, ...] | None) -> None:
    assert asked_numbers(prompt) == numbers


def test_every_caption_of_the_grammar_is_read_as_its_scene() -> None:
    rng = random.Random(3)
    for _ in range(400):
        scene = sample_scene(rng)
        words = caption(scene, rng)
        # Of one kind, natural and in its natural colour's name may be said the same way: then they are one group.
        kinds = [(g.object, NATURAL_COLOURS[g.object] if g.colour is None else g.colour) for g in groups(scene)]
        if len({name for name, _ in kinds}) == len(kinds):
            assert sorted(asked_numbers(words) or ()) == sorted(g.count for g in groups(scene)), words
