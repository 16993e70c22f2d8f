"""Settings survive a PNG in both dialects, and hostile files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from mm.core.errors import UserError
from mm.core.png_settings import from_a1111, read_settings, save_png, to_a1111

SETTINGS = {
    "prompt": "two red cats, on grass",
    "seed": 7,
    "steps": 12,
    "mode": "flow",
    "guidance": 4.0,
    "width": 128,
    "height": 128,
    "model": "mm-tiny",
}


def test_settings_survive_a_png(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", Image.new("RGB", (128, 128), "red"), SETTINGS)
    assert read_settings(tmp_path / "a.png") == SETTINGS
    assert Image.open(tmp_path / "a.png").text["parameters"] == to_a1111(SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a1111_text_is_what_others_write_and_read() -> None:
    text = to_a1111(SETTINGS)
    assert text.startswith("two red cats, on grass\nSteps: 12, Sampler: flow, CFG scale: 4.0, Seed: 7, Size: 128x128")
    assert from_a1111(text) == SETTINGS
    foreign = "a dog\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 99, Size: 512x768"
    found = from_a1111(foreign)
    assert (found["prompt"], found["steps"], found["seed"], found["width"], found["height"]) == (
        "a dog",
        20,
        99,
        512,
        768,
    )


def test_a_foreign_png_without_json_is_read(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a dog\nSteps: 20, Seed: 99")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", pnginfo=chunks)
    assert read_settings(tmp_path / "b.png") == {"prompt": "a dog", "steps": 20, "seed": 99}


def test_metadata_can_be_turned_off(tmp_path: Path) -> None:
    save_png(tmp_path / "c.png", Image.new("RGB", (8, 8)), None)
    with pytest.raises(UserError, match="no settings that are known"):
        read_settings(tmp_path / "c.png")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nbroken", b"GIF89a" + b"\0" * 40])
def test_what_is_no_png_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.png").write_bytes(content)
    with pytest.raises(UserError, match="no readable PNG"):
        read_settings(tmp_path / "d.png")


def test_broken_json_is_refused(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("mm", "{no json")
    Image.new("RGB", (8, 8)).save(tmp_path / "e.png", pnginfo=chunks)
    with pytest.raises(UserError, match="settings cannot be read"):
        read_settings(tmp_path / "e.png")


def test_hostile_text_is_refused_or_read_plainly(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("mm", "[" * 100_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "f.png", pnginfo=chunks)
    with pytest.raises(UserError, match="settings cannot be read"):
        read_settings(tmp_path / "f.png")
    found = from_a1111(f"a dog\nSteps: 2, Size: {'9' * 5000}x8")
    assert (found["prompt"], found["steps"], "width" in found) == ("a dog", 2, False)
