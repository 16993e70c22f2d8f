"""Scripted conversations: our scripts are held out and drawable, and conversers get what they deserve."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from mm.core.errors import UserError
from mm.evaluation import chat
from mm.world.judge import Found, Judge, Reading
from mm.world.render import render
from mm.world.scene import Scene, group_relation, groups, is_held_out, place
from mm.world.tasks import Expectation
from mm.world.words import WORDS, split


def true_scene(wanted: Expectation, rng: random.Random) -> Scene:
    while True:
        sprites = place(rng, wanted.groups, wanted.style or "cartoon")
        scene = Scene(sprites=sprites or (), background=wanted.background or "plain", style=wanted.style or "cartoon")
        parts = groups(scene)
        if wanted.relation is None:
            return scene
        first, name, second = wanted.relation
        if name in group_relation(scene, parts[first], parts[second]):
            return scene


class Perfect:
    """Draws the renderer's truth and answers what the judge will see."""

    def __init__(self) -> None:
        self.scripts = {tuple(t.say for t in s): s for s in chat.load_scripts()}
        self.judge = Judge.from_pretrained()

    def chat(self, turns, *, seed=0, steps=12):
        rng, last, out = random.Random(seed), None, []
        for turn in self.scripts[tuple(turns)]:
            if turn.draws is not None:
                pixels = render([true_scene(turn.draws, rng)])
                last = self.judge.read(pixels)[0]
                out.append(("", Image.fromarray(pixels[0].permute(1, 2, 0).numpy())))
            else:
                kind, name = turn.asks
                out.append((min(chat._ANSWERS[kind](last, name), default=""), None))
        return out


class Silent(Perfect):
    def chat(self, turns, *, seed=0, steps=12):
        return [("yes", None)] * len(turns)


def test_our_scripts_are_twenty_of_four_turns_in_known_words_and_held_out(tmp_path):
    scripts = chat.load_scripts()
    assert [len(s) for s in scripts] == [chat.TURNS] * 20
    assert all(script[0].draws is not None and script[1].draws is not None for script in scripts)
    assert all(is_held_out(script[0].draws.groups) for script in scripts)
    assert {word for s in scripts for t in s for word in split(t.say)} <= set(WORDS)
    chat.write_scripts(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == chat.SCRIPTS.read_text()


def test_conversers_get_what_they_deserve(tmp_path):
    report = chat.evaluate_chat(Perfect(), Judge.from_pretrained(), json_file=tmp_path / "r.json")
    assert report["overall"] >= 0.9
    assert abs(report["overall"] - report["ceiling"]) < 0.06, "other renders of the same demands"
    assert report["n"] == 80
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert Image.open(tmp_path / "r.png").width > 500
    assert chat.evaluate_chat(Silent(), Judge.from_pretrained(), limit=5)["overall"] == 0.0


def _reading(*names: str) -> Reading:
    found = tuple(Found(object=n, colour=None, x=9, y=9, size=9, confidence=1.0, colours=("red",)) for n in names)
    return Reading(readable=True, objects=found, background="snow", style="cartoon")


def test_an_answer_is_judged_by_the_picture_that_was_drawn():
    ask = chat.Turn(say="how many owls are there?", asks=("count", "owl"))
    assert chat.judge_turn(ask, "two", None, _reading("owl", "owl", "cat"))
    assert not chat.judge_turn(ask, "one", None, _reading("owl", "owl", "cat"))
    assert not chat.judge_turn(ask, "two", _reading("owl", "owl"), _reading("owl", "owl")), "it drew instead"
    assert not chat.judge_turn(ask, "two", None, None), "there is nothing to count"
    animals = chat.Turn(say="how many animals are there?", asks=("count", "animals"))
    assert chat.judge_turn(animals, "three.", None, _reading("owl", "owl", "cat", "tree"))
    colour = chat.Turn(say="what colour is the owl?", asks=("colour", "owl"))
    assert chat.judge_turn(colour, "red", None, _reading("owl"))
    assert not chat.judge_turn(colour, "blue", None, _reading("owl"))


def test_what_was_to_go_must_be_gone():
    wanted = Expectation(task="two objects", groups=_groups("cat"), background="snow")
    turn = chat.Turn(say="remove the owl", draws=wanted, gone=("owl",))
    assert chat.judge_turn(turn, "", _reading("cat"), None)
    assert not chat.judge_turn(turn, "", _reading("cat", "owl"), None)
    assert not chat.judge_turn(turn, "ok", None, _reading("cat")), "it only talked"


def _groups(*names: str):
    from mm.world.scene import Group

    return tuple(Group(object=n) for n in names)


@pytest.mark.parametrize(
    "line", ['{"turns": [{"say": "hi"}]}', '{"turns": [{"say": "hi", "asks": ["size", "cat"]}]}', "no"]
)
def test_a_bad_script_is_named(tmp_path, line):
    (tmp_path / "s.jsonl").write_text(chat.SCRIPTS.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"s\.jsonl, line 2"):
        chat.load_scripts(tmp_path / "s.jsonl")
