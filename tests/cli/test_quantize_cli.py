"""`mm quantize` and `mm generate --bits 4` through the real command, on a tiny model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_pipeline

from mm.quantization.folders import judged_change


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def test_a_copy_is_written_with_its_report_and_draws(model, tmp_path, cli):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat on grass\n\ntwo red dogs\n")
    out = tmp_path / "small"
    done = cli(
        "quantize", model, "-o", out, "--prompts", prompts, "--steps", 2, "--pictures", 2, "--compose", 1, "--rank", 2
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    low = [layer for layer in report["layers"] if layer["bits"] != 16]
    assert f"{len(low)} layers" in done.stdout
    assert report["whole"]["pictures"] == 2
    judged = report["whole"]["compose"]
    assert judged["pictures"] == 12
    right = [round(12 * judged[key], 6) for key in ("before", "after")]
    assert all(count in range(13) for count in right)
    assert 12 * judged["change"] == pytest.approx(right[1] - right[0])
    assert report["whole"]["prompts"] == ["a cat on grass", "two red dogs"]
    assert {layer["path"].split(".")[0] for layer in report["layers"]} == {"trunk", "velocity_decoder", "code_head"}
    assert Image.open(out / "report.png").width > 300
    assert not (out / ".parts").exists()
    drawn = cli("generate", "a cat", "--model", out, "-o", tmp_path / "pictures", "--seed", 1, "--steps", 2)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "pictures" / "00000.png").is_file()


def test_generate_in_4_bits_makes_the_copy_once(model, tmp_path, cli):
    words = ("generate", "a cat", "--model", model, "--bits", 4, "--seed", 1, "--steps", 2, "-o")
    first = cli(*words, tmp_path / "a", env={"MM_CACHE": str(tmp_path / "cache")})
    assert first.returncode == 0, first.stderr
    made = list((tmp_path / "cache" / "quantized").iterdir())
    assert len(made) == 1
    stamp = (made[0] / "report.json").stat().st_mtime_ns
    again = cli(*words, tmp_path / "b", env={"MM_CACHE": str(tmp_path / "cache")})
    assert again.returncode == 0, again.stderr
    assert (made[0] / "report.json").stat().st_mtime_ns == stamp
    pictures = [(tmp_path / name / "00000.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]
    (made[0] / "report.json").unlink()  # as if the first run had been killed
    third = cli(*words, tmp_path / "d", env={"MM_CACHE": str(tmp_path / "cache")})
    assert third.returncode == 0, third.stderr
    assert (made[0] / "report.json").is_file()
    assert (tmp_path / "d" / "00000.png").read_bytes() == pictures[0]
    plain = cli("generate", "a cat", "--model", model, "--seed", 1, "--steps", 2, "-o", tmp_path / "c")
    assert plain.returncode == 0
    assert (tmp_path / "c" / "00000.png").read_bytes() != pictures[0]


def test_wrong_input_is_one_line(model, tmp_path, cli):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    cases = (
        (("quantize", model, "-o", full), "is not empty"),
        (("quantize", model, "-o", empty), "empty.txt is a file; give a new folder"),
        (("quantize", model, "-o", tmp_path / "x", "--size-budget", "0.5"), "acts with bits='auto' alone"),
        (("quantize", tmp_path / "nowhere", "-o", tmp_path / "x"), "no model"),
        (("quantize", model, "-o", tmp_path / "x", "--bits", "auto"), "needs a budget"),
        (("quantize", model, "-o", tmp_path / "x", "--bits", "3"), "bits 3"),
        (("quantize", model, "-o", tmp_path / "x", "--prompts", empty), "holds no prompt"),
        (("quantize", model, "-o", tmp_path / "x", "--component", "unet", "--data-free"), "no module unet"),
    )
    for words, text in cases:
        done = cli(*words)
        assert done.returncode == 1
        assert text in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("x/.parts/*"))
    assert (full / "mine.txt").read_text() == "keep"


def test_the_judged_change_is_that_of_prompts_not_of_pictures():
    before, after = [True, True, False, False] * 40, [True, True, True, True] * 40
    judged = judged_change(before, after, each=2)
    assert (judged["before"], judged["after"], judged["change"], judged["pictures"]) == (0.5, 1.0, 0.5, 160)
    half = 1.96 * (0.25 / 80) ** 0.5  # normal interval of 80 prompts that change by 0 or 1, each as a whole
    assert judged["low"] == pytest.approx(0.5 - half, abs=0.02)
    assert judged["high"] == pytest.approx(0.5 + half, abs=0.02)
