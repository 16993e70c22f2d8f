"""Subjects drawn apart by our model: the command, the engine, batch rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import mm
from mm.cli.generate import app
from mm.core.errors import UserError
from mm.customization import apart


def test_a_model_without_weights_says_so_once(files: list[Path], one_try: None) -> None:
    from mm.engine.events import Notice
    from mm.engine.requests import Draw

    engine = mm.load("mm-tiny", adapters=files)
    found: list[Any] = []
    engine.run(Draw(prompt="a (<catcar>:1.3) and an <owlclock>", seed=1, steps=2, apart=True)).each(found.append)
    texts = [event.text for event in found if isinstance(event, Notice) and "weights" in event.text]
    assert len(texts) == 1 and "'a (<catcar>:1.3) and an <owlclock>' is read without them" in texts[0]


@pytest.fixture
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that have hardly learned anything are not seen in any try."""
    monkeypatch.setattr(apart, "_TRIES", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of our model with words of their own, briefly learned."""
    from mm.evaluation.customize_table import write_folder

    pipe = mm.load("mm-tiny").pipeline
    pipe.set_progress_bar_config(disable=True)
    found = []
    for name in ("catcar", "owlclock"):
        folder = tmp_path_factory.mktemp(name)
        patch = mm.customize(
            pipe, write_folder(folder / "pictures", name), name=f"<{name}>", samples=(), steps=2, preview_every=2,
            companions=0, batch_size=1, preserved=(),
        )  # fmt: skip
        patch.save(folder / f"{name}.safetensors")
        found.append(folder / f"{name}.safetensors")
    return found


def test_the_command_draws_apart_and_again(files: list[Path], tmp_path: Path, one_try: None) -> None:
    from mm.provenance.file_settings import read_file_settings

    given = ["a <catcar> and an <owlclock> on grass", "--seed", "3", "--steps", "3", "--apart"]
    given += ["--stand-in", "<catcar>=dog", *(part for file in files for part in ("--lora", str(file)))]
    first, second = tmp_path / "one.png", tmp_path / "two.png"
    made = CliRunner().invoke(app, [*given, "-o", str(first)])
    assert made.exit_code == 0, made.output
    assert read_file_settings(first)["apart"] == {"<catcar>": "dog"}
    assert CliRunner().invoke(app, ["--like", str(first), "-o", str(second)]).exit_code == 0
    assert first.read_bytes() == second.read_bytes()
    assert read_file_settings(first)["refine"] == 0.45


def test_a_file_of_before_subjects_were_drawn_again_draws_the_same(
    files: list[Path], tmp_path: Path, one_try: None
) -> None:
    from mm.core.png_settings import save_png
    from mm.provenance.file_settings import read_file_settings

    given = ["a <catcar> and an <owlclock> on grass", "--seed", "3", "--steps", "4", "--apart"]
    given += [part for file in files for part in ("--lora", str(file))]
    plain, usual, old, again = (tmp_path / f"{name}.png" for name in ("plain", "usual", "old", "again"))
    for file, more in ((plain, ["--refine", "0"]), (usual, [])):
        made = CliRunner().invoke(app, [*given, *more, "-o", str(file)])
        assert made.exit_code == 0, made.output
    settings = read_file_settings(plain)
    assert settings.pop("refine") == 0
    save_png(old, Image.open(plain), settings)
    assert CliRunner().invoke(app, ["--like", str(old), "-o", str(again)]).exit_code == 0
    pixels = [Image.open(file).tobytes() for file in (plain, again, usual)]
    assert pixels[0] == pixels[1] != pixels[2]


def test_the_engine_counts_the_steps_of_all_runs(files: list[Path], one_try: None) -> None:
    from mm.engine.events import Picture, Step
    from mm.engine.requests import Draw

    engine = mm.load("mm-tiny", adapters=files)
    events: list[Any] = []
    request = Draw(prompt="a <catcar> and an <owlclock>", seed=1, steps=2, apart=True, count=2, batch_size=2)
    engine.run(request).each(events.append)
    steps = [(event.step, event.steps) for event in events if isinstance(event, Step)]
    assert steps[-1] == (10, 10) and {total for _, total in steps} == {10}
    pictures = [event for event in events if isinstance(event, Picture)]
    assert [picture.settings["apart"] for picture in pictures] == [True, True]
    alone = engine.draw("a <catcar> and an <owlclock>", seed=2, steps=2, apart=True)[0]
    assert list(alone.getdata()) == list(pictures[1].picture.getdata())


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"best_of": 2}, "best_of is given, and adapters cannot be kept apart with it"),
        ({"mode": "codes"}, "mode is 'codes'; mm-tiny keeps adapters apart in the mode flow only"),
        ({"image": Image.new("RGB", (128, 128))}, "image is given"),
        ({"apart": "left"}, "apart is 'left'"),
        ({"options": {"output_type": "pt"}}, "output_type is of no use for pictures that are drawn apart"),
        ({"options": {"mode": "codes"}}, "mode is 'codes'"),
        ({"refine": 2}, "refine is 2; give a number from 0 to 1"),
        ({"refine": 0.5, "apart": False}, "refine is 0.5 without apart"),
        ({"apart": {"<catcar>": 3}}, "what stands in for <catcar> is 3"),
    ],
)
def test_the_engine_refuses_what_does_not_fit(more: dict[str, Any], wanted: str) -> None:
    engine = mm.load("mm-tiny")
    with pytest.raises(UserError, match=wanted):
        engine.draw("a <catcar>", **({"apart": True} | more))


def test_a_batch_row_is_drawn_apart(files: list[Path], tmp_path: Path, one_try: None) -> None:
    from mm.cli.batch import app as batch

    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    row = {
        "custom_id": "both", "task": "generate",
        "body": {
            "prompt": "a <catcar> and an <owlclock>", "lora": [file.name for file in files], "steps": 2, "seed": 1,
            "apart": True, "refine": 0.5,
        },
    }  # fmt: skip
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps(row) + "\n")
    made = CliRunner().invoke(batch, [str(jobs), "-o", str(tmp_path / "out"), "--root", str(tmp_path)])
    assert made.exit_code == 0, made.output
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1
