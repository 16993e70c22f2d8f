"""Questions are answered by the scene, in known words, and never ask what cannot be seen."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mm.models.text import unknown_words
from mm.world import vocabulary as v
from mm.world.questions import KINDS, questions
from mm.world.scene import Scene, Sprite, sample_scene


def test_words_kinds_and_balance() -> None:
    rng = random.Random(0)
    asked = [qa for _ in range(500) for qa in questions(sample_scene(rng), rng)]
    assert {qa.kind for qa in asked} == set(KINDS)
    for qa in asked:
        assert not unknown_words(f"{qa.question} {qa.answer}"), qa
    answers = Counter(qa.answer for qa in asked if qa.kind == "existence")
    assert answers["yes"] == answers["no"]
    sides = Counter(qa.answer for qa in asked if qa.kind == "position")
    assert 0.4 < sides["yes"] / sum(sides.values()) < 0.6


def test_an_empty_scene_is_refused() -> None:
    with pytest.raises(ValueError, match="without sprites"):
        questions(Scene(sprites=()), random.Random(0))


def test_hidden_things_are_not_asked() -> None:
    rng = random.Random(1)
    for _ in range(300):
        scene = sample_scene(rng)
        kinds = {qa.kind for qa in questions(scene, rng)}
        assert v.shows_colour(scene.style) or "colour" not in kinds
        assert v.shows_background(scene.style) == ("background" in kinds)


def test_answers_of_a_known_scene() -> None:
    cat = Sprite(object="cat", colour="blue", x=32, y=64, size=44)
    apple = Sprite(object="apple", x=96, y=64, size=44)
    scene = Scene(sprites=(cat, apple), background="grass")
    found = {(qa.kind, qa.question): qa.answer for seed in range(60) for qa in questions(scene, random.Random(seed))}
    assert found["colour", "what colour is the cat?"] == "blue"
    assert found["colour", "what colour is the apple?"] == "red"
    assert found["position", "is the cat left of the apple?"] == "yes"
    assert found["position", "is the apple left of the cat?"] == "no"
    assert found["count", "how many cats are there?"] == "one"
    assert all(answer == "grass" for (kind, _), answer in found.items() if kind == "background")
    assert ("existence", "can you see a tiger?") in found  # a look-alike of the cat
