"""`mm customize` on a folder of a tiny pipeline: files, messages, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, tiny_pipeline_of
from typer.testing import CliRunner

import mm.cli


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_pipeline_of("stable-diffusion").save_pretrained(tmp_path / "model", safe_serialization=True)
    return tmp_path / "model"


def test_a_folder_becomes_a_file(model: Path, tmp_path: Path) -> None:
    photos, out = subject_folder(tmp_path / "photos"), tmp_path / "mug.safetensors"
    words = ["customize", str(photos), "--name", "<mug>", "-o", str(out), "--model", str(model)]
    words += ["--steps", "2", "--size", str(SIDE), "--batch-size", "1", "--rank", "2"]
    done = CliRunner().invoke(mm.cli.app, words)
    assert done.exit_code == 0, done.output
    assert "2 steps" in done.stdout
    assert "trained values" in done.stderr
    assert out.is_file()
    work = tmp_path / "mug.safetensors.work"
    assert (work / "loss.png").is_file()
    assert not list(work.glob("*.safetensors"))
    engine = mm.load(model, adapters=[str(out)])
    assert any("mug.safetensors" in note for note in engine.notes)
    again = CliRunner().invoke(mm.cli.app, words)
    assert again.exit_code == 1
    assert "exists; choose another name" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_a_missing_folder_is_one_line() -> None:
    done = CliRunner().invoke(mm.cli.app, ["customize", "no-such", "--name", "<mug>", "-o", "x.safetensors"])
    assert done.exit_code == 1
    assert done.stderr.strip() == "mm: no-such is no folder; give a folder with a few pictures"
