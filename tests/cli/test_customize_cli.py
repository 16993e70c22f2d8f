"""`mm customize` on a folder of a tiny pipeline: files, messages, and what is left behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
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


@pytest.fixture(scope="module")
def kept_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "model"
    tiny_pipeline_of("stable-diffusion").save_pretrained(folder, safe_serialization=True)
    return folder


def _run(model: Path, out: Path, *words: str) -> Result:
    short = ["--steps", "1", "--size", str(SIDE), "--batch-size", "1", "--rank", "1", "--model", str(model)]
    return CliRunner().invoke(mm.cli.app, ["customize", *words, "-o", str(out), *short])


def _broken(photos: Path) -> None:
    (photos / "5.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")


def _two(photos: Path) -> None:
    subject_folder(photos / "1_cat")
    subject_folder(photos / "1_dog")


def _lone(photos: Path) -> None:
    (photos / "lost.txt").write_text("a caption\n")


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (lambda photos: [p.unlink() for p in photos.iterdir()], ["--name", "<mug>"], "holds no picture"),
        (lambda photos: [p.write_bytes(b"x") for p in photos.glob("*.png")], ["--name", "<mug>"], "can be read"),
        (_two, ["--name", "<mug>"], "holds 2 subjects"),
        (lambda photos: (photos / "0.txt").write_text("<other> on grass"), ["--name", "<mug>"], "names <other>"),
        (lambda photos: (photos / "0.txt").write_bytes(b"\xff\xfe\xff"), ["--name", "<mug>"], "no UTF-8 text"),
        (lambda photos: None, ["--name", "<mug>", "--kind", "edit"], "cannot edit"),
        (lambda photos: None, ["--name", "<mug>", "--kind", "thing"], "kind is 'thing'"),
        (lambda photos: None, ["--name", "<mug>", "--method", "magic"], "no method 'magic'"),
        (lambda photos: None, ["--name", "<mug>", "--layout", "a1111"], "the layout is 'a1111'"),
        (lambda photos: None, ["--name", "<mug>", "--guard", ""], "a guarded concept is empty"),
        (lambda photos: None, [], "the name is ''"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    make: Any, words: list[str], message: str, kept_model: Path, tmp_path: Path
) -> None:  # fmt: skip
    photos, out = subject_folder(tmp_path / "photos"), tmp_path / "mug.safetensors"
    make(photos)
    done = _run(kept_model, out, str(photos), *words)
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("mm: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("make", "message"), [(_broken, "the other 3 pictures are used"), (_lone, "has no picture of the same name")]
)
def test_what_can_be_left_out_is_warned_of(make: Any, message: str, kept_model: Path, tmp_path: Path) -> None:
    photos, out = subject_folder(tmp_path / "photos"), tmp_path / "mug.safetensors"
    make(photos)
    done = _run(kept_model, out, str(photos), "--name", "<mug>")
    assert done.exit_code == 0, done.output
    assert next(line for line in done.stderr.splitlines() if message in line).startswith("mm: ")
    assert ".py:" not in done.stderr  # no line of the program's code
    assert out.is_file()


def test_a_word_of_the_model_warns_and_of_ours_is_refused(kept_model: Path, tmp_path: Path) -> None:
    photos, vocabulary = subject_folder(tmp_path / "photos"), tiny_pipeline_of("stable-diffusion").tokenizer.get_vocab()
    whole = [word.removesuffix("</w>") for word in vocabulary if word.endswith("</w>")]
    word = next(word for word in whole if word.isalnum())
    done = _run(kept_model, tmp_path / "word.safetensors", str(photos), "--name", word)
    assert done.exit_code == 0, done.output
    assert next(line for line in done.stderr.splitlines() if "knows already" in line).startswith("mm: ")
    done = CliRunner().invoke(
        mm.cli.app, ["customize", str(photos), "--name", "cat", "-o", str(tmp_path / "cat.safetensors")]
    )
    assert done.exit_code == 1
    assert "is a word of the model already" in done.stderr


def test_a_full_disk_keeps_the_file_that_was_there(
    kept_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The last write fails: the old adapter is whole, the error is one line, and the state goes on afterwards."""
    from mm.core import files

    photos, out = subject_folder(tmp_path / "photos"), tmp_path / "mug.safetensors"
    out.write_bytes(b"the old one")
    words = [str(photos), "--name", "<mug>", "--force"]
    real = os.replace

    def full(source: Any, target: Any, **more: Any) -> None:
        if Path(target).name == out.name:
            raise OSError(28, "No space left on device", str(target))
        real(source, target, **more)

    monkeypatch.setattr(files.os, "replace", full)
    done = _run(kept_model, out, *words)
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"mm: {out} cannot be written (No space left on device); what was learned is kept in ")
    assert out.read_bytes() == b"the old one"
    assert (tmp_path / "mug.safetensors.work" / "state.safetensors").is_file()
    monkeypatch.undo()
    again = _run(kept_model, out, *words)
    assert again.exit_code == 0, again.output
    assert out.read_bytes() != b"the old one"


def test_a_disk_without_room_for_the_state_is_found_before_the_run(
    kept_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=9, used=9, free=1000))
    photos = subject_folder(tmp_path / "photos")
    done = _run(kept_model, tmp_path / "out.safetensors", str(photos), "--name", "<mug>")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("mm: the run's state needs up to ")
    assert "step 1" not in done.stderr
    assert not (tmp_path / "out.safetensors").exists()
