"""Options that contradict each other, or could only be found wrong after long work, are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_pipeline
from typer.testing import CliRunner

import mm.cli
from mm.core.errors import UserError
from mm.erasure.sites import text_layers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("doctor", "--json", "folder"), "folder is a folder; give a file name"),
        (("eval", "compose", "--json", "folder"), "folder is a folder; give a file name"),
        (("eval", "compose", "--json", "x.png"), "x.png ends in .png"),
        (("eval", "erase", "wolf", "--json", "file/x.json"), "file is no folder, so file/x.json cannot be written"),
        (("provenance", "x.png", "--model", "mm-tiny"), "to read a picture leave it out"),
        (("provenance", "--stamp", "5", "-o", "new", "--json", "x.json"), "leave --json out"),
        (("erase", "wolf", "-o", "x.safetensors", "--lora", "x.safetensors"), "is the patch and the LoRA file"),
        (("erase", "wolf", "-o", "x.safetensors", "--layout", "peft"), "is that of --lora, which is not given"),
        (("erase", "wolf", "-o", "x.safetensors", "--lora", "y", "--layout", "z"), "the layout is 'z'; there are"),
        (("erase", "wolf", "-o", "file/x.safetensors"), "file is no folder, so file/x.safetensors cannot be written"),
        (("quantize", "mm-tiny", "-o", "file"), "file is a file; give a new folder"),
    ],
)
def test_it_is_named_and_nothing_is_written(words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    done = CliRunner().invoke(mm.cli.app, list(words))
    assert done.exit_code == 1
    assert message in done.output.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    "words",
    [
        ("train", "mm-tiny", "--minutes", "nan"), ("train", "mm-tiny", "--minutes", "-1"),
        ("train", "mm-tiny", "--batch-size", "0"), ("train", "mm-tiny", "--learning-rate", "-1"),
        ("train", "mm-tiny", "--codes-share", "9"), ("train", "mm-tiny", "--seed", "-5"),
        *((*command, "--seed", "4294967296") for command in (
            ("generate", "x"), ("edit", "x", "y"), ("chat",), ("batch", "x", "-o", "y"), ("quantize", "x", "-o", "y"),
            ("customize", "x", "-o", "y"), ("eval", "compose"), ("eval", "erase", "wolf"), ("train", "x"),
        )),
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_out_of_range_are_wrong_options(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(mm.cli.app, list(words))
    assert done.exit_code == 2 and "Invalid value for" in done.output


def test_a_site_that_is_no_regular_expression_or_matches_nothing() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(UserError, match=r"the site '\(' is no regular expression"):
        text_layers(pipe, ("(",))
    with pytest.raises(UserError, match="no linear layer of TextToImagePipeline has a path that matches nosuch"):
        text_layers(pipe, ("nosuch",))
