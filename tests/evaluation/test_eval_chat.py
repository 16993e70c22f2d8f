"""Scripted conversations: our scripts are held out and drawable, and conversers get what they deserve."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mm.core.errors import UserError
from mm.evaluation import chat
from mm.evaluation.chat_scripts import write_scripts
from mm.world.judge import Found, Judge, Reading
from mm.world.render import render
from mm.world.scene import Scene, group_relation, groups, is_held_out, place
from mm.world.tasks import Expectation
from mm.world.words import WORDS, split


def true_scene(wanted: Expectation, rng: random.Random) -> Scene:
    while True:
        sprites = place(rng, wanted.groups, wanted.style or "cartoon")
        if sprites is None:
            continue
        scene = Scene(sprites=sprites, background=wanted.background or "plain", style=wanted.style or "cartoon")
        parts = groups(scene)
        if wanted.relation is None:
            return scene
        first, name, second = wanted.relation
        if name in group_relation(scene, parts[first], parts[second]):
            return scene


SAID = {"greeting": "hello!", "thanks": "you are welcome", "help": "I can draw", "outside": "I do not know that"}


class Perfect:
    """Draws the renderer's truth and answers what the judge will see."""

    def __init__(self) -> None:
        every = [*chat.load_scripts(), *chat.load_scripts(chat.LONG_SCRIPTS)]
        self.scripts = {tuple(t.say for t in s): s for s in every}
        self.judge = Judge.from_pretrained()

    def chat(self, turns, *, seed=0, steps=12):
        rng, last, out, shown = random.Random(seed), None, [], []
        for turn in self.scripts[tuple(turns)]:
            if turn.undo:
                shown.pop()
                out.append(("", shown[-1]))
                last = self.judge.read(pil_to_tensor(shown[-1])[None])[0]
            elif turn.draws is not None:
                pixels = render([true_scene(turn.draws, rng)])
                last = self.judge.read(pixels)[0]
                shown.append(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()))
                out.append(("", shown[-1]))
            elif turn.says is not None:
                out.append((SAID[turn.says], None))
            else:
                kind, name = turn.asks
                out.append((min(chat._ANSWERS[kind](last, name), default=""), None))
        return out


class Silent(Perfect):
    def chat(self, turns, *, seed=0, steps=12):
        return [("yes", None)] * len(turns)


def test_our_scripts_are_twenty_of_four_turns_in_known_words_and_held_out(tmp_path):
    scripts = chat.load_scripts()
    assert [len(s) for s in scripts] == [4] * 20
    assert all(script[0].draws is not None and script[1].draws is not None for script in scripts)
    assert all(is_held_out(script[0].draws.groups) for script in scripts)
    assert {word for s in scripts for t in s for word in split(t.say)} <= set(WORDS)
    long = chat.load_scripts(chat.LONG_SCRIPTS)
    assert [len(s) for s in long] == [12] * 20
    assert sum(turn.off for script in long for turn in script) >= 100
    for path, kind in ((chat.SCRIPTS, "short"), (chat.LONG_SCRIPTS, "long")):
        write_scripts(tmp_path / path.name, kind)
        assert (tmp_path / path.name).read_text() == path.read_text()
    write_scripts(tmp_path / "tune.jsonl", "long", held_out=False)
    tuning = [t for s in chat.load_scripts(tmp_path / "tune.jsonl") for t in s]
    assert not any(is_held_out(t.draws.groups) for t in tuning[1::12])
    assert not {t.say for t in tuning if t.says} & {t.say for s in long for t in s if t.says}


def test_conversers_get_what_they_deserve(tmp_path):
    report = chat.evaluate_chat(Perfect(), Judge.from_pretrained(), limit=8, json_file=tmp_path / "r.json")
    assert report["overall"] >= 0.9
    assert abs(report["overall"] - report["ceiling"]) < 0.06, "other renders of the same demands"
    assert report["n"] == 8 * (4 + 12)
    assert (report["tasks"]["says"]["n"], report["tasks"]["undo"]["n"]) == (24, 8)
    assert report["tasks"]["undo"]["score"] == report["tasks"]["says"]["score"] == 1.0
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert Image.open(tmp_path / "r.png").width > 500
    silent = chat.evaluate_chat(Silent(), Judge.from_pretrained(), scripts=[chat.SCRIPTS], limit=5)
    assert silent["overall"] == 0.0


def _reading(*names: str) -> Reading:
    found = tuple(Found(object=n, colour=None, x=9, y=9, size=9, confidence=1.0, colours=("red",)) for n in names)
    return Reading(readable=True, objects=found, background="snow", style="cartoon")


def test_an_answer_is_judged_by_the_picture_that_was_drawn():
    ask = chat.Turn(say="how many owls are there?", asks=("count", "owl"))
    none = chat.Turn(say="how many dogs are there?", asks=("count", "dog"))
    assert chat.judge_turn(none, "none", None, _reading("owl")) and chat.judge_turn(none, "zero", None, _reading("owl"))
    assert not chat.judge_turn(none, "two", None, _reading("owl"))
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


def test_replies_in_words_and_undo_are_judged_by_what_was_said_and_shown():
    thanks, undo = chat.Turn(say="thanks", says="thanks", off=True), chat.Turn(say="undo", undo=True, off=True)
    assert chat.judge_turn(thanks, "You are welcome!", None, None)
    assert not chat.judge_turn(thanks, "You are welcome!", _reading("cat"), None), "it drew as well"
    assert not chat.judge_turn(thanks, "two", None, None)
    assert chat.judge_turn(undo, "", _reading("cat"), _reading("cat"), back=True)
    assert not chat.judge_turn(undo, "", _reading("cat"), _reading("cat"), back=False)
    assert [t.kind for t in (thanks, undo)] == ["says", "undo"]


@pytest.mark.parametrize(
    "line",
    [
        '{"turns": [{"say": "hi"}]}',
        '{"turns": [{"say": "hi", "asks": ["size", "cat"]}]}',
        '{"turns": [{"say": "hi", "says": "joke"}]}',
        "no",
    ],
)
def test_a_bad_script_is_named(tmp_path, line):
    (tmp_path / "s.jsonl").write_text(chat.SCRIPTS.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"s\.jsonl, line 2"):
        chat.load_scripts(tmp_path / "s.jsonl")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no script; put one JSON object a line"),
        ("x\n", "line 1: it is no JSON"),
        ('{"turns": []}\n', "line 1: it has no list of turns"),
        ('{"talk": []}\n', "line 1: it has no list of turns"),
        (
            '{"turns": [{"say": "a", "draws": {"groups": [["unicorn", null, 1]]}}]}\n',
            "unknown object 'unicorn'",
        ),
        ('{"turns": [{"say": "draw a cat", "draws": {"groups": [["cat", null, 0]]}}]}\n', "count of 'cat' is 0"),
        ('{"turns": [{"say": "a", "draws": {"groups": [["cat", null, 1]], "style": "baroque"}}]}\n', "unknown style"),
        ('{"turns": [{"say": 3, "undo": true}]}\n', "say is 3, not a text"),
    ],
)
def test_a_file_that_holds_no_scripts_is_refused_before_anything_is_said(tmp_path, text: str, says: str) -> None:
    file = tmp_path / "scripts.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as found:
        chat.load_scripts(file)
    assert "UserError(" not in str(found.value) and str(file) in str(found.value)
