"""GenEval's rules on readings made by hand."""

from __future__ import annotations

import random

import pytest

from mm.world import vocabulary as v
from mm.world.judge import Found, Reading
from mm.world.scene import Group, relation
from mm.world.tasks import TASKS, Expectation, sample_task, satisfies


def found(name: str, x: float = 64, y: float = 64, *, colours: tuple = (None,), confidence: float = 0.9) -> Found:
    return Found(object=name, colour=colours[0], x=x, y=y, size=40, confidence=confidence, colours=colours)


def read(*objects: Found, readable: bool = True) -> Reading:
    return Reading(readable=readable, objects=objects, background="grass", style="neon")


def want(task: str, *groups: Group, **more) -> Expectation:
    return Expectation(task=task, groups=groups, **more)


CAT, DOG = Group(object="cat"), Group(object="dog")


def test_single_and_two_objects_do_not_punish_extras():
    assert satisfies(read(found("cat"), found("cat"), found("dog")), want("single object", CAT)).ok
    assert satisfies(read(found("cat"), found("bus"), found("dog")), want("two objects", CAT, DOG)).ok
    verdict = satisfies(read(found("cat")), want("two objects", CAT, DOG))
    assert not verdict.ok
    assert verdict.reason == "wanted 1 dog, found 0"


def test_counting_demands_exactly_n():
    three = want("counting", Group(object="wolf", count=3))
    wolves = [found("wolf")] * 4
    assert [satisfies(read(*wolves[:n]), three).ok for n in (2, 3, 4)] == [False, True, False]
    assert satisfies(read(*wolves[:3], found("cat"), found("dog")), three).ok
    assert satisfies(read(*wolves[:2]), three).reason == "wanted 3 wolves, found 2"


def test_colours_ask_what_the_object_answers_to():
    red = want("colours", Group(object="apple", colour="red"))
    assert satisfies(read(found("apple", colours=(None, "red"))), red).ok
    assert not satisfies(read(found("apple", colours=("blue",))), red).ok
    assert satisfies(read(found("apple", colours=("blue",)), found("apple", colours=("red",))), red).ok
    assert satisfies(read(found("apple", colours=("blue",))), want("single object", Group(object="apple"))).ok


def test_colour_attribution_binds_colours_to_objects():
    both = want("colour attribution", Group(object="cat", colour="blue"), Group(object="dog", colour="pink"))
    blue, pink = ("blue",), ("pink",)
    assert satisfies(read(found("cat", colours=blue), found("dog", colours=pink)), both).ok
    assert not satisfies(read(found("cat", colours=pink), found("dog", colours=blue)), both).ok


@pytest.mark.parametrize(
    ("name", "dx", "dy"), [("left of", -50, 0), ("right of", 50, 0), ("above", 0, -50), ("below", 0, 50)]
)
def test_position_follows_the_rule(name, dx, dy):
    cat, dog = found("cat", 64 + dx, 64 + dy), found("dog")
    for other in v.RELATIONS:
        verdict = satisfies(read(cat, dog), want("position", CAT, DOG, relation=(0, other, 1)))
        assert verdict.ok == (other == name)
    assert satisfies(read(cat, dog), want("position", CAT, DOG, relation=(1, v.OPPOSITE[name], 0))).ok


def test_position_is_judged_on_the_most_confident_pair():
    sure, unsure = found("cat", 20, 64, confidence=0.9), found("cat", 110, 64, confidence=0.6)
    demand = want("position", CAT, DOG, relation=(0, "left of", 1))
    assert satisfies(read(unsure, sure, found("dog")), demand).ok
    assert not satisfies(read(found("cat", 110, 64, confidence=0.95), sure, found("dog")), demand).ok
    assert "neither" in satisfies(read(found("cat"), found("dog")), demand).reason


def test_style_and_background_are_judged_apart():
    verdict = satisfies(read(), want("single object", CAT, background="grass", style="sketch"))
    assert not verdict.ok
    assert (verdict.background_ok, verdict.style_ok) == (True, False)
    verdict = satisfies(read(found("cat")), want("single object", CAT))
    assert verdict.ok
    assert (verdict.background_ok, verdict.style_ok) == (None, None)


def test_unreadable_fails_everything():
    demand = want("single object", CAT, background="grass", style="neon")
    verdict = satisfies(read(found("cat"), readable=False), demand)
    assert not (verdict.ok or verdict.readable or verdict.background_ok or verdict.style_ok)
    assert verdict.reason == "unreadable"


def test_bad_expectations_are_refused():
    with pytest.raises(ValueError, match="unknown task 'colors'"):
        want("colors", CAT)
    with pytest.raises(ValueError, match="at least one group"):
        want("single object")
    with pytest.raises(ValueError, match="do not go together"):
        want("position", CAT, DOG)
    with pytest.raises(ValueError, match="unknown relation 'beside'"):
        want("position", CAT, DOG, relation=(0, "beside", 1))
    with pytest.raises(ValueError, match="must name two of 2 groups"):
        want("position", CAT, DOG, relation=(0, "above", 2))
    with pytest.raises(ValueError, match="shows no colour"):
        sample_task(random.Random(0), "colours", style="sepia")


@pytest.mark.parametrize("task", TASKS)
def test_sampled_scenes_meet_their_own_demand(task):
    rng = random.Random(task)
    for style in v.STYLES:
        if task.startswith("colour") and not v.shows_colour(style):
            continue
        for _ in range(10):
            scene, demand = sample_task(rng, task, style=style)
            seen = [
                Found(
                    object=s.object,
                    colour=s.colour,
                    x=s.x,
                    y=s.y,
                    size=s.size,
                    confidence=1,
                    colours=tuple(c for c in (None, *v.COLOURS) if v.counts_as(s.object, s.colour, c)),
                )
                for s in scene.sprites
            ]
            reading = Reading(readable=True, objects=tuple(seen), background=scene.background, style=style)
            assert satisfies(reading, demand).ok
            if task == "position":
                assert demand.relation is not None
                assert demand.relation[1] in relation(scene.sprites[0], scene.sprites[1])
