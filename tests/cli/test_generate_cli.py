"""`mm generate` through the real command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Run
from PIL import Image
from tiny import tiny_pipeline

from mm.cli.drawing import Job, run
from mm.core.errors import UserError
from mm.core.png_settings import read_settings
from mm.engine.capabilities import Capabilities
from mm.engine.output import save_numbered
from mm.engine.settings import drawn_again
from mm.engine.variants import variants


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


def test_command_and_python_draw_the_same_pictures(cli: Run, folder: Path, tmp_path: Path) -> None:
    command = ["generate", "two red cats on grass", "-n", "3", "--seed", "7", "--steps", "2"]
    command += ["--model", str(folder), "-o", str(tmp_path), "--batch-size", "2"]
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [str(tmp_path / f"0000{k}.png") for k in range(3)]
    pipe = tiny_pipeline()
    for k in range(3):
        generator = torch.Generator().manual_seed(7 + k)
        mine = pipe("two red cats on grass", generator=generator, num_inference_steps=2).images[0]
        theirs = Image.open(tmp_path / f"0000{k}.png")
        assert np.abs(np.asarray(mine, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 2
        settings = read_settings(tmp_path / f"0000{k}.png")
        assert (settings["seed"], settings["prompt"], settings["steps"]) == (7 + k, "two red cats on grass", 2)
    again = cli(*command[:2], "--steps", "1", "--model", str(folder), "-o", str(tmp_path), "--no-metadata")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(str(tmp_path / "00003.png"))  # nothing is overwritten


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_like_reads_every_format_that_is_written(cli: Run, folder: Path, tmp_path: Path, suffix: str) -> None:
    first, again, plain = (tmp_path / name for name in (f"a.{suffix}", "again.png", "plain.png"))
    command = ["generate", "two red cats on grass", "--seed", "7", "--steps", "2", "--guidance", "3", "--no-strict"]
    for arguments in (
        [*command, "--model", str(folder), "-o", str(first)], [*command, "--model", str(folder), "-o", str(plain)],
        ["generate", "--like", str(first), "-o", str(again)],
    ):  # fmt: skip
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
    assert Image.open(again).tobytes() == Image.open(plain).tobytes()
    said, wanted = read_settings(again), read_settings(plain)
    assert said == wanted and said["strict"] is False  # A1111's text has no name for it


def test_errors_are_one_line(cli: Run, folder: Path, tmp_path: Path) -> None:
    bad = cli("generate", " ", "--model", str(folder), "-o", str(tmp_path))
    assert bad.returncode == 1
    assert bad.stderr.strip().splitlines()[-1].startswith("mm: the prompt is empty")
    missing = cli("generate", "a cat", "--model", str(tmp_path / "nowhere"), "-o", str(tmp_path))
    assert missing.returncode == 1
    assert "nowhere" in missing.stderr
    assert not list(tmp_path.glob("*.png"))
    assert cli("generate", "a cat", "--mode", "magic").returncode == 2


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({}, {"like": "like.png", "matrix": True}, "--matrix acts on a prompt"),
        ({}, {"like": "like.png", "wildcards": "words"}, "--wildcards acts on a prompt"),
        ({"prompt": "a {cat|dog}"}, {"wildcards": "words"}, "has no __NAME__"),
    ],
)
def test_alternatives_without_effect_are_refused(
    changes: dict[str, str], more: dict[str, Any], said: str, tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "animals.txt").write_text("cat\ndog\n")
    paths = {key: tmp_path / value if isinstance(value, str) else value for key, value in more.items()}
    with pytest.raises(UserError, match=said):
        run(Job(changes=changes, loading={}, out=tmp_path, **paths))


def test_another_prompt_is_no_picture_of_the_old_batch() -> None:
    settings = {"prompt": "a cat", "seed": 8, "batch": [2, 1]}
    can = Capabilities(model="m", tasks=("draw",), size=(8, 8))
    assert drawn_again(settings, can).keep == 1
    other = drawn_again(settings, can, prompt="a {dog|dog}")
    assert other.keep is None and other.request.seed == 8
    (one,) = variants(other.request)
    assert one.prompt == "a dog"


def test_numbers_go_on_and_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "00004.png").write_bytes(b"an earlier one")
    (tmp_path / "²3.png").write_bytes(b"no number of ours")
    link, calls = os.link, []

    def beaten(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 1:
            Path(target).write_bytes(b"another command's")
        link(source, target)

    monkeypatch.setattr(os, "link", beaten)
    assert save_numbered(tmp_path, b"mine") == tmp_path / "00006.png"
    assert (tmp_path / "00005.png").read_bytes() == b"another command's"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00004.png", "00005.png", "00006.png", "²3.png"]
