"""The measures of reading and editing: perfect and bad readers get what they deserve, and captions read back."""

from __future__ import annotations

import errno
import json
import os
import random
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mm.core import files
from mm.evaluation import edit as edits
from mm.evaluation import report as reports
from mm.evaluation import understand as u
from mm.world.captions import caption
from mm.world.edits import Edit
from mm.world.judge import Found, Reading
from mm.world.questions import questions
from mm.world.render import render
from mm.world.scene import Group, Scene, Sprite, groups, is_held_out, sample_scene


def test_plain_captions_read_back_without_a_loss():
    rng = random.Random(5)
    for _ in range(300):
        scene = sample_scene(rng)
        holds, said, recalled, there = u.judge_facts(u.read_caption(caption(scene, rng, detail="plain")), scene)
        assert holds == said, caption(scene, rng, detail="plain")
        assert recalled == there


def test_wrong_facts_cost_precision_and_missing_ones_recall():
    sprites = (Sprite(object="cat", x=30, y=64, size=44), Sprite(object="dog", colour="red", x=96, y=64, size=44))
    scene = Scene(sprites=sprites, background="grass")
    cases = {
        "a cat left of a red dog on grass": (5, 5, 4, 4),
        "a cat right of a red dog on grass": (4, 5, 4, 4),
        "a cat on grass": (3, 3, 3, 4),
        "two cats and a red dog in the snow, sepia style": (1, 4, 1, 4),
        "a cat and a blue dog": (2, 3, 2, 4),
    }
    for text, want in cases.items():
        assert u.judge_facts(u.read_caption(text), scene) == want, text
    assert u.read_caption("three green owls").groups == (Group(object="owl", colour="green", count=3),)


class Perfect:
    """Knows the scenes by their pictures."""

    def __init__(self, config: u.UnderstandConfig) -> None:
        scenes = u.held_out_scenes(config)
        self.by_picture = {p.tobytes(): s for p, s in zip(u.to_pictures(scenes), scenes, strict=True)}
        rng = random.Random(f"questions {config.seed}")
        self.known = {}
        for scene in scenes:
            for qa in questions(scene, rng):
                self.known[id(scene), qa.question] = qa.answer

    def answer(self, pictures, asked):
        return [self.known[id(self.by_picture[p.tobytes()]), q] for p, q in zip(pictures, asked, strict=True)]

    def describe(self, pictures):
        return [caption(self.by_picture[p.tobytes()], random.Random(0), detail="plain") for p in pictures]


class YesMan(Perfect):
    def answer(self, pictures, asked):
        return ["yes"] * len(asked)

    def describe(self, pictures):
        return ["a cat"] * len(pictures)


def test_readers_get_what_they_deserve(tmp_path):
    config = u.UnderstandConfig(limit=40)
    assert all(is_held_out(groups(scene)) for scene in u.held_out_scenes(config))
    tuning = u.UnderstandConfig(limit=40, tuning=True)
    assert not any(is_held_out(groups(scene)) for scene in u.held_out_scenes(tuning))
    report = u.evaluate_understand(Perfect(config), config, json_file=tmp_path / "r.json")
    assert report["overall"] == 1.0
    assert report["captions"] == report["ceiling_captions"] == {"precision": 1.0, "recall": 1.0}
    assert json.loads((tmp_path / "r.json").read_text())["overall"] == 1.0
    assert Image.open(tmp_path / "r.png").width > 500
    agreeing = u.evaluate_understand(YesMan(config), config)
    assert agreeing["tasks"]["existence"]["score"] == pytest.approx(0.5)
    assert agreeing["yes_share"] == 1.0
    assert agreeing["tasks"]["style"]["score"] == 0.0
    assert agreeing["captions"]["recall"] < 0.5


def reading_of(scene: Scene) -> Reading:
    """What a judge without faults would say."""
    found = tuple(
        Found(object=s.object, colour=s.colour, x=s.x, y=s.y, size=s.size, confidence=1.0, colours=(s.colour,))
        for s in scene.sprites
    )
    return Reading(readable=True, objects=found, background=scene.background, style=scene.style)


def test_true_targets_succeed_and_untouched_sources_fail():
    for edit in edits.held_out_edits(edits.EditConfig(limit=15)):
        success, kept = edits.judge_edit(edit, reading_of(edit.target))
        assert success and kept == 1.0, edit
        untouched, kept = edits.judge_edit(edit, reading_of(edit.source))
        assert not untouched, edit
        assert kept == 1.0, edit
    unreadable = Reading(readable=False, objects=(), background="plain", style="cartoon")
    assert edits.judge_edit(edit, unreadable) == (False, 0.0)


def test_losing_the_rest_is_seen():
    edit = next(
        e for e in edits.held_out_edits(edits.EditConfig(limit=15)) if e.kind == "add" and len(e.source.sprites) > 1
    )
    added = [s for s in edit.target.sprites if s not in edit.source.sprites]
    alone = Scene(sprites=tuple(added), background=edit.target.background, style=edit.target.style)
    assert edits.judge_edit(edit, reading_of(alone))[1] < 1.0


def shifted(scene: Scene, name: str, x: int, y: int) -> Scene:
    return replace(scene, sprites=tuple(replace(s, x=x, y=y) if s.object == name else s for s in scene.sprites))


def test_what_is_added_or_moved_may_stand_anywhere_that_the_words_allow():
    cat, owl = Sprite(object="cat", x=64, y=64, size=36), Sprite(object="owl", x=24, y=64, size=36)
    source, target = Scene(sprites=(cat,)), Scene(sprites=(cat, owl))
    placed = Edit(kind="add", source=source, target=target, instruction="add an owl left of the cat")
    free = replace(placed, instruction="add an owl")
    for x, y, left in ((24, 64, True), (24, 88, True), (104, 64, False)):
        reading = reading_of(shifted(target, "owl", x, y))
        assert edits.judge_edit(placed, reading) == (left, 1.0)
        assert edits.judge_edit(free, reading) == (True, 1.0)
    assert not edits.judge_edit(free, reading_of(source))[0]
    gone = reading_of(Scene(sprites=(owl,)))
    assert edits.judge_edit(placed, gone)[0] is False  # left of what?
    moved = Edit(
        kind="move", source=source, target=shifted(source, "cat", 24, 64), instruction="move the cat to the left"
    )
    for x, y, right in ((24, 64, True), (40, 64, True), (64, 64, False), (104, 64, False), (24, 104, False)):
        assert edits.judge_edit(moved, reading_of(shifted(source, "cat", x, y)))[0] is right


def test_an_editor_is_measured_through_the_judge(tmp_path):
    from mm.world.judge import Judge

    config = edits.EditConfig(limit=2)
    chosen = edits.held_out_edits(config)
    sources = [p.tobytes() for p in u.to_pictures([e.source for e in chosen])]
    wanted = {(s, e.instruction): e.target for s, e in zip(sources, chosen, strict=True)}

    class True_:
        def edit(self, pictures, instructions, seeds):
            made = render([wanted[p.tobytes(), i] for p, i in zip(pictures, instructions, strict=True)])
            return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in made]

    class Lazy:
        def edit(self, pictures, instructions, seeds):
            warnings.warn("the picture is unlike those that the model was trained on", stacklevel=2)
            return list(pictures)

    judge = Judge.from_pretrained()
    report = edits.evaluate_edit(True_(), judge, config, json_file=tmp_path / "e.json")
    assert report["overall"] == report["ceiling"] > 0.9
    assert Image.open(tmp_path / "e.png").width > 500
    with warnings.catch_warnings():  # the sources are the evaluation's own, and nobody can change them
        warnings.simplefilter("error")
        assert edits.evaluate_edit(Lazy(), judge, config)["overall"] < 0.3


def test_a_report_that_cannot_be_written_is_printed(tmp_path, monkeypatch, capsys):
    """On a full disk, after hours of work."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x.json"))

    monkeypatch.setattr(reports, "write_files", full)
    with pytest.raises(OSError, match="No space left"):
        reports.write_report(tmp_path / "x.json", {"overall": 0.5})
    assert json.loads(capsys.readouterr().out) == {"overall": 0.5}


def test_a_report_and_its_grid_are_written_together(tmp_path, monkeypatch):
    """On a disk that gets full in between, neither is there; the older ones stay."""
    grid = reports.grid_png(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["a"], [None])
    reports.write_report(tmp_path / "x.json", {"overall": 0.5}, grid)
    assert (tmp_path / "x.png").read_bytes() == grid
    wrote = []

    def full(path, data):
        wrote.append(path)
        if len(wrote) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        path.write_bytes(data)

    monkeypatch.setattr(files, "_write_through", full)
    with pytest.raises(OSError, match="No space left"):
        reports.write_report(tmp_path / "x.json", {"overall": 0.9}, b"another grid")
    assert json.loads((tmp_path / "x.json").read_text()) == {"overall": 0.5}
    assert (tmp_path / "x.png").read_bytes() == grid
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]
