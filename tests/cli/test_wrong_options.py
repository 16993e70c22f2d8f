"""Options that contradict each other, or could only be found wrong after long work, are refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_pipeline
from typer.testing import CliRunner

import mm.cli
from mm.core.errors import UserError
from mm.erasure.sites import text_layers
from mm.training.run import ORDER, STAGES
from mm.training.stage_flags import CONFIGS, check_flags, fields_of


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
        (("erase", "wolf", "-o", "x", "--scope", "read", "--lora", "y"), "no LoRA file holds; leave out --lora y"),
        (("erase", "wolf", "-o", "file/x.safetensors"), "file is no folder, so file/x.safetensors cannot be written"),
        (("quantize", "mm-tiny", "-o", "file"), "file is a file; give a new folder"),
        (("quantize", "mm-tiny", "-o", "new", "--data-free", "--prompts", "file"), "so --prompts has no effect"),
        (("quantize", "mm-tiny", "-o", "new", "--data-free", "--steps", "8"), "so --steps has no effect"),
        (("quantize", "mm-tiny", "-o", "new", "--bits", "four"), "bits 'four': weights take 4, 8 or 'auto'"),
        (("quantize", "mm-tiny", "-o", "new", "--bits", "3"), "bits 3: weights take 4, 8 or 'auto'"),
        (("quantize", "mm-tiny", "-o", "new", "--variant", "fp16"), "holds no file of variant 'fp16'"),
        (("quantize", "mm-tiny", "-o", "new", "--component", "nosuch"), "has no module nosuch"),
        (("quantize", "mm-tiny", "-o", "new", "--size", "64"), "TextToImagePipeline draws 128 x 128 only"),
        (("train", "mm-tiny", "--stage", "counter", "--codes-share", ".5"), "the stage counter does not use"),
        (("train", "mm-tiny", "--stage", "bridge", "--minutes", "3"), "the stage bridge does not use"),
        (
            ("train", "mm-tiny", "--stage", "judge", "--publish", "x"),
            "that use it: drawing, joint, crisp, enlarger, fingerprint",
        ),
        (("train", "mm-tiny", "--stage", "drawing", "--state", "file"), "file is a file"),
        (("train", "mm-tiny", "--stage", "drawing", "--init-from", "folder", "--state", "new"), "no autoencoder/"),
        (("erase", "xyzzy", "-o", "x"), "the model does not know 'xyzzy'"),
        (("erase", "wolf", "-o", "x", "--anchor", "xyzzy"), "the anchor is 'xyzzy'"),
        (("erase", "wolf", "-o", "x", "--retain", "xyzzy"), "the retained concept is 'xyzzy'"),
        (("erase", "wolf", "-o", "x", "--anchor", "cat", "--anchor", "dog"), "1 target and 2 anchors"),
        (("erase", "wolf", "-o", "x", "--setting", "nosuch=1"), "uce has no setting 'nosuch'"),
        (("eval", "understand", "--each", "3"), "--each 3 is given without --wide"),
        (("eval", "erase", "wolf", "--attack", "nosuch"), "no attack 'nosuch'"),
        (("eval", "erase", "wolf", "--quantize", "nosuch"), "no quantization 'nosuch'"),
        (("eval", "erase", "--patch", "file", "--method", "uce"), "--method would act on a patch that is made"),
        (("eval", "erase", "--patch", "file", "--how", "stacked"), "--how would act on a patch that is made"),
        (("eval", "erase", "wolf", "--judge", "folder"), "no judge in folder: config.json is missing"),
        (("eval", "customize", "--work", "file"), "file is a file"),
        (("eval", "customize", "--one-ground", "nowhere"), "the background is 'nowhere'"),
        (("eval", "customize", "--method", "nosuch"), "no method 'nosuch'"),
        (("eval", "customize", "--method", "nosuch"), ", shira, zero-shot"),
        (("customize", "folder", "-o", "x", "--name", "<mug>", "--work", "file"), "file is a file"),
        (("customize", "folder", "-o", "x", "--name", "<mug>", "--sample", " "), "a sample prompt is empty"),
        (("customize", "folder", "-o", "x", "--name", "<mug>", "--size", "64"), "draws 128 x 128 only; leave it out"),
        (("merge", "file", "file", "-o", "x"), "file is given twice"),
        (("merge", "file", "-o", "x"), "1 adapter to merge"),
        (("eval", "customize", "--method", "lora", "--method", "eva"), "--method is given 2 times; it takes one value"),
        (("generate", "x", "-n", "1", "-n", "2"), "--count is given 2 times"),
        (("merge", "file", "folder", "-o", "x"), "there is no adapter in the folder folder; it should hold"),
        (("merge", "file", "b", "-o", "x", "--weight", "nan", "--weight", "1"), "weight is nan"),
        (("merge", "file", "b", "-o", "x", "--density", ".3"), "density is 0.3, which sum does not use"),
        (("merge", "file", "b", "-o", "x", "--rank", "4", "--method", "orthogonal"), "which orthogonal does not use"),
        (("generate", "a {red|blue cat", "-o", "new"), "has a { that is not closed, in '{red|blue cat'"),
        *((*command, "file exists; choose another name, or give --force") for command in (
            (("doctor", "--json", "file"),), (("provenance", "x.png", "--json", "file"),),
            (("describe", "x.png", "--json", "file"),), (("eval", "compose", "--json", "file"),),
            (("eval", "erase", "wolf", "--json", "file"),), (("erase", "wolf", "-o", "file"),),
            (("merge", "a", "b", "-o", "file"),), (("customize", "folder", "--name", "<m>", "-o", "file"),),
        )),
    ],
    ids=lambda given: " ".join(given)[:60] if isinstance(given, tuple) else "",
)  # fmt: skip
def test_it_is_named_and_nothing_is_written(words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    done = CliRunner().invoke(mm.cli.app, list(words))
    assert done.exit_code == 1
    assert message in done.output.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"
    assert "Loading" not in done.output


@pytest.mark.parametrize(
    "words",
    [
        ("train", "mm-tiny", "--minutes", "nan"), ("train", "mm-tiny", "--minutes", "-1"),
        ("train", "mm-tiny", "--batch-size", "0"), ("train", "mm-tiny", "--learning-rate", "-1"),
        ("train", "mm-tiny", "--codes-share", "9"), ("train", "mm-tiny", "--seed", "-5"),
        ("eval", "compose", "--pictures", "1001"), ("eval", "compose", "--steps", "1001"),
        ("eval", "edit", "--limit", "1001"),
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


def test_force_replaces_a_report(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    file.write_text("old")
    for words in (("--force", "--json", str(file)), ("--json", str(file), "--force")):
        done = CliRunner().invoke(mm.cli.app, ["doctor", *words])
        assert done.exit_code == 0, done.output
    assert "kernels" in json.loads(file.read_text())


def test_each_stage_names_a_config_of_its_own() -> None:
    assert set(CONFIGS) == set(STAGES)
    assert all({"minutes", "workers"} <= fields_of(stage) for stage in CONFIGS)
    assert [stage for stage in ORDER if "codes_share" in fields_of(stage)] == ["drawing", "joint"]
    check_flags(ORDER, {"codes_share": 0.5, "minutes": 1.0, "workers": None}, ORDER)
