"""`fast` through the engine, the command line and batch rows: ours and diffusers' pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline
from tiny_pipelines import tiny_pipeline_of
from typer.testing import CliRunner

import mm
import mm.cli
from mm.core.errors import UserError
from mm.core.png_settings import read_settings
from mm.engine.events import Done, Notice, Picture
from mm.engine.requests import Draw, Edit, Turn
from mm.engine.settings import drawn_again
from mm.families import family_of
from mm.fast.guidance import AdaptiveGuidance
from mm.pipelines.fast import FastCodes, FastFlow, fast_settings
from mm.pipelines.self_reader import Shortfall


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(root / "ours")
    for name in ("stable-diffusion", "flux"):
        tiny_pipeline_of(name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def sd(folders: Path) -> Any:
    return mm.load(folders / "stable-diffusion", dtype="float32")


@pytest.fixture(scope="module")
def ours(folders: Path) -> Any:
    return mm.load(folders / "ours")


def drawn(engine: Any, **settings: Any) -> list[Picture]:
    events: list[Any] = []
    engine.run(Draw(prompt="a red fox", seed=5, **settings)).each(events.append)
    assert isinstance(events[-1], Done)
    return [event for event in events if isinstance(event, Picture)]


def events_of(engine: Any, request: Draw) -> list[Picture]:
    events: list[Any] = []
    engine.run(request).each(events.append)
    return [event for event in events if isinstance(event, Picture)]


def same(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a.picture), np.asarray(b.picture))


SD = {"size": (32, 32), "steps": 4}


def test_a_public_model_leaves_guidance_out_and_draws_the_picture_again(sd: Any):
    full, fast = drawn(sd, **SD), drawn(sd, **SD, fast={"threshold": -1})
    assert not same(full[0], fast[0])
    assert fast[0].settings["fast"] == {"threshold": -1, "linear": False} and "fast" not in full[0].settings
    again = drawn_again(json.loads(json.dumps(fast[0].settings)), sd.capabilities)
    assert not again.notes and same(drawn(sd, **SD, fast=again.request.fast)[0], fast[0])
    assert same(drawn(sd, **SD)[0], full[0])  # the run left nothing behind
    assert drawn(sd, **SD, fast=True)[0].settings["fast"] == {
        "threshold": AdaptiveGuidance().threshold,
        "linear": False,
    }


def test_pictures_of_a_public_model_are_those_of_single_calls(sd: Any):
    several = drawn(sd, **SD, fast={"threshold": 0.9}, count=3, batch_size=3)
    alone = [drawn(sd, **SD, fast={"threshold": 0.9})[0]]
    assert len(several) == 3 and same(several[0], alone[0]) and "batch" not in several[0].settings


def test_ours_takes_the_steps_of_the_mix_and_draws_the_picture_again(ours: Any):
    for mode, steps in (("flow", "steps"), ("codes", "unchecked_steps")):  # the tiny model cannot read
        fast = drawn(ours, mode=mode, fast=True)[0]
        assert fast.settings["fast"] == fast_settings(mode, {})
        assert fast.settings["steps"] == fast.settings["fast"][steps]
        again = drawn_again(fast.settings, ours.capabilities).request
        made: list[Any] = []
        ours.run(again).each(made.append)
        assert same(next(event for event in made if isinstance(event, Picture)), fast)
    assert drawn(ours, fast=True, steps=5)[0].settings["steps"] == 5
    assert ours.capabilities.steps_of(Draw(prompt="x")) == 12
    assert FastFlow().steps < 12


def test_files_say_the_steps_that_were_drawn_and_are_drawn_again(ours: Any, monkeypatch: pytest.MonkeyPatch):
    """A picture that could not be checked takes more steps than the mix; files of before named those of the mix."""
    monkeypatch.setattr(type(ours.pipeline), "_can_read", lambda self: True)
    monkeypatch.setattr(type(ours.pipeline), "_checker", lambda self, asked: lambda rows, _: [None] * len(rows))
    less = {"mode": "codes", "fast": {"steps": 2, "unchecked_steps": 5}}
    for prompt, steps in (("a cat in a house", 5), ("a cat", 2)):
        (first,) = events_of(ours, Draw(prompt=prompt, seed=5, **less))
        assert first.settings["steps"] == steps and first.settings["fast"]["steps"] == 2
        for kept in (first.settings, first.settings | {"steps": 2}):
            again = drawn_again(kept, ours.capabilities)
            (second,) = events_of(ours, again.request)
            assert not again.notes and same(first, second) and second.settings == first.settings


def test_what_no_try_of_the_mix_shows_is_a_notice(ours: Any, monkeypatch: pytest.MonkeyPatch):
    """As with `best_of`, and together with it; that nothing was checked is said where `best_of` asks for it."""
    lacks = Shortfall(wrong=3, missing=("2 cats",))
    monkeypatch.setattr(type(ours.pipeline), "_can_read", lambda self: True)
    monkeypatch.setattr(
        type(ours.pipeline), "_checker", lambda self, asked: lambda rows, _: [asked[i] and lacks for i in rows]
    )
    less = {"mode": "codes", "fast": {"steps": 2, "unchecked_steps": 2, "tries": 3}}
    for more, tries in (({}, 3), ({"best_of": 2}, 2)):
        events: list[Any] = []
        ours.run(Draw(prompt="two cats", seed=5, **less, **more)).each(events.append)
        notices = [event.text for event in events if isinstance(event, Notice)]
        assert notices == [f"'two cats': the model does not see in any of {tries} tries 2 cats (seed 5)"]
    events = []
    ours.run(Draw(prompt="a cat in a house", seed=5, **less)).each(events.append)
    assert not [event for event in events if isinstance(event, Notice) and "best_of" in event.text]


@pytest.mark.parametrize(
    "fast, more, said",
    [
        ({"treshold": 1}, {}, "no setting 'treshold' here; it takes threshold, linear"),
        ({"threshold": "high"}, {}, "threshold is 'high'"),
        (True, {"guidance": 1}, "fast leaves out guidance, and guidance is 1"),
        (3, {}, "fast is 3; give true, false or settings by name"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_drawn(sd: Any, fast: Any, more: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        sd.run(Draw(prompt="a red fox", fast=fast, **more))


def test_distilled_guidance_is_refused_unless_there_is_true_guidance_as_well(folders: Path):
    flux = mm.load(folders / "flux", dtype="float32")
    with pytest.raises(UserError, match="distilled"):
        flux.run(Draw(prompt="a red fox", fast=True))
    given = {"size": (32, 32), "steps": 3, "negative": "blue", "options": {"true_cfg_scale": 4.0}}
    full, fast = drawn(flux, **given), drawn(flux, **given, fast={"threshold": -1})
    assert not same(full[0], fast[0])
    # another model's settings: what it cannot do is named
    can = mm.load(folders / "flux", dtype="float32").capabilities
    assert can.fast and family_of(flux.pipeline) is not None


def test_other_tasks_of_ours_are_refused(ours: Any):
    from PIL import Image

    source = Image.new("RGB", (128, 128))
    for request in (Edit(image=source, instruction="make it red", fast=True),
                    Turn(conversation=None, words="draw a cat", fast=True)):  # fmt: skip
        with pytest.raises(UserError, match=r"fast in these tasks only: draw|cannot"):
            ours.run(request)


def test_nothing_left_out_is_a_notice(sd: Any):
    """Guidance that the options turn off: the run says that fast did nothing."""
    events: list[Any] = []
    request = Draw(prompt="a fox", seed=1, fast=True, options={"guidance_scale": 1.0}, **SD)  # type: ignore[arg-type]
    sd.run(request).each(events.append)
    assert any("nothing was left out" in event.text for event in events if isinstance(event, Notice))


def test_the_command_line_and_batch_rows(folders: Path, tmp_path: Path):
    base = ["generate", "a red fox", "--model", str(folders / "ours"), "--seed", "3"]
    done = CliRunner().invoke(mm.cli.app, [*base, "--fast", "--fast-set", "steps=3", "-o", str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    settings = read_settings(tmp_path / "a.png")
    assert settings["steps"] == 3 and settings["fast"] == fast_settings("flow", {"steps": 3})
    like = ["generate", "--like", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]
    assert CliRunner().invoke(mm.cli.app, like).exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    rows = [{"custom_id": name, "task": "generate", "body": {"prompt": "a red fox", "seed": 3, "fast": fast}}
            for name, fast in (("x", {"steps": 3}), ("y", {"steps": 0}))]  # fmt: skip
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    job = ["batch", str(tmp_path / "jobs.jsonl"), "--model", str(folders / "ours"), "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(mm.cli.app, job)
    assert done.exit_code == 2, done.output  # row y cannot be drawn
    [picture] = (tmp_path / "run").rglob("*.png")
    assert read_settings(picture)["fast"] == fast_settings("flow", {"steps": 3})


def test_shipped_weights_check_what_they_drew():
    """In codes mode a picture is drawn again while the model misses something; its settings draw it again."""
    engine = mm.load("mm-tiny")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    prompts = ["four cakes at night", "a cat in a house"]
    with pytest.warns(UserWarning, match="nothing is drawn inside other things"):
        made = engine.pipeline(prompts, mode="codes", fast=True, output_type="latent", generator=generators)
    assert made.right[1] is None and made.tries[1] == 1 and 1 <= made.tries[0] <= FastCodes().tries
    events: list[Any] = []
    engine.run(Draw(prompt=prompts[0], seed=0, mode="codes", fast=True)).each(events.append)
    [picture] = [event for event in events if isinstance(event, Picture)]
    assert picture.settings["fast"] == fast_settings("codes", {}) and "best_of" not in picture.settings
    assert not [event for event in events if isinstance(event, Notice)]
    again: list[Any] = []
    kept = json.loads(json.dumps(picture.settings))
    engine.run(drawn_again(kept, engine.capabilities).request).each(again.append)
    assert same(next(event for event in again if isinstance(event, Picture)), picture)
    assert engine.pipeline.self_reader is not None  # loaded once, and not anew by each run
