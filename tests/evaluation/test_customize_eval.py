"""`mm eval customize`: its subjects, prompts and verdicts, and one short run that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mm
from mm.core.errors import UserError
from mm.evaluation.customize import CustomizeConfig, evaluate_customize
from mm.evaluation.customize_subjects import GROUNDS, asks, follows, scenes_of, shows, true_scenes, write_pictures
from mm.world import vocabulary as v
from mm.world.judge import Found, Judge, Reading
from mm.world.render import render


def _reading(*objects: str, background: str = "grass", style: str = "cartoon") -> Reading:
    found = tuple(Found(object=o, colour=None, x=0, y=0, size=40, confidence=1.0) for o in objects)
    return Reading(readable=True, objects=found, background=background, style=style)


def test_five_pictures_on_five_backgrounds(tmp_path: Path) -> None:
    scenes = scenes_of("tulip")
    assert [scene.background for scene in scenes] == list(GROUNDS)
    assert {s.object for scene in scenes for s in scene.sprites} == {"tulip"}
    assert scenes == scenes_of("tulip")
    folder = write_pictures(tmp_path / "a", "tulip")
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{i}.{end}" for i in range(5) for end in ("png", "txt"))
    assert (folder / "0.txt").read_text() == "a [trigger] on grass\n"
    plain = write_pictures(tmp_path / "b", "tulip", ("sky",) * 5, captions=False)
    assert len(list(plain.iterdir())) == 5


def test_tuning_and_reporting_share_no_prompt_that_names_a_background() -> None:
    tune, report = ({ask.text for ask in asks(tuning=t) if ask.background} for t in (True, False))
    assert len(tune) == len(report) == len(v.BACKGROUNDS)
    assert not tune & report


def test_the_judge_knows_the_subjects() -> None:
    """On renders of what the prompts ask for it sees each subject, its background, style and companion."""
    judge, prompts = Judge.from_pretrained(), asks()
    for subject in v.HELD_OUT_OBJECTS[:2]:
        readings = judge.read(render(true_scenes(subject, prompts)))
        assert sum(shows(r, subject) for r in readings) >= 0.9 * len(readings)
        met = [done for r, ask in zip(readings, prompts, strict=True) if (done := follows(r, ask)) is not None]
        assert sum(met) >= 0.9 * len(met)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"subjects": ("unicorn",)}, "the subject is 'unicorn'; there are panda"),
        ({"subjects": ("panda", "robot", "panda")}, "the subject 'panda' is given twice"),
        ({"one_ground": "nowhere"}, "the background is 'nowhere'; there are sky"),
        ({"method": "zero-shot", "settings": {"steps": 5}}, "zero-shot learns nothing, so leave out steps"),
    ],
)
def test_wrong_settings_are_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        CustomizeConfig(**given)


def test_verdicts() -> None:
    named = {ask.background: ask for ask in asks() if ask.background}
    assert follows(_reading("tulip"), named["grass"])
    assert not follows(_reading("tulip"), named["sky"])
    assert follows(_reading("tulip"), asks()[0]) is None
    beside = next(ask for ask in asks() if ask.companion == "cat")
    assert follows(_reading("tulip", "cat"), beside)
    assert not follows(_reading("tulip", "dog"), beside)
    assert shows(_reading("dog", "tulip"), "tulip")
    assert not shows(_reading("dog"), "tulip")
    with pytest.raises(UserError, match="the subject is 'wolf'"):
        CustomizeConfig(subjects=("wolf",))


def test_a_short_run_reports_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = mm.TextToImagePipeline.from_pretrained("mm-tiny")
    pipe.set_progress_bar_config(disable=True)
    calls: list[int] = []
    real = type(pipe).__call__

    def quick(self: Any, prompt: Any, **options: Any) -> Any:
        calls.append(len(prompt))
        return real(self, prompt, **(options | {"num_inference_steps": 1}))

    monkeypatch.setattr(type(pipe), "__call__", quick)
    some = asks()[:3] + asks()[-1:]
    monkeypatch.setattr("mm.evaluation.customize.asks", lambda tuning: some)
    settings = {"steps": 1, "batch_size": 1, "preserve_batch": 1, "preview_every": 1, "companions": 0}
    config = CustomizeConfig(
        subjects=("gift",), method="textual-inversion", pictures=1, limit=1, settings=settings
    )  # fmt: skip
    report = evaluate_customize(pipe, Judge.from_pretrained(), config, work=tmp_path, json_file=tmp_path / "r.json")
    assert report["n"] == len(some) - 1
    assert report["together"]["n"] == report["together_base"]["n"] == 1
    assert report["drift"]["n"] == 6
    assert report["drift"]["change"] == 0  # a word alone changes no other prompt
    assert report["ceiling"] == 1
    assert json.loads((tmp_path / "r.json").read_text())["tasks"]["gift"]["n"] == len(some) - 1
    assert 0 < report["bytes"] < 10_000
    drawn = len(calls)
    with torch.random.fork_rng():
        again = evaluate_customize(pipe, Judge.from_pretrained(), config, work=tmp_path)
    assert len(calls) == drawn  # nothing was drawn again
    assert again == report
