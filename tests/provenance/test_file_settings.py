"""Settings in JPEG and WebP files, as mm and other programs write them, and what a hostile file may not do."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, PngImagePlugin
from typer.testing import CliRunner

import mm.cli
from mm.core.errors import UserError
from mm.engine.output import picture_bytes
from mm.provenance.file_settings import read_file_settings
from mm.provenance.report import provenance

TEXT = "a dog on grass\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 99, Size: 512x768"
GRAPH = {
    "1": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 9, "cfg": 4.5, "positive": ["2", 0]}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red fox"}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
}
SUFFIXES = (".jpg", ".webp")


def _saved(path: Path, *, comment: bytes | None = None, fields: dict[int, str] | None = None) -> Path:
    exif = Image.Exif()
    if comment is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    for tag, value in (fields or {}).items():
        exif[tag] = value
    Image.new("RGB", (16, 16), "red").save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"), b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"), b"ASCII\0\0\0" + TEXT.encode(), b"\0" * 8 + TEXT.encode(), TEXT.encode(),
    ],
    ids=["be", "le", "bom", "ascii", "undefined", "bare"],
)  # fmt: skip
def test_the_text_of_a1111(suffix: str, comment: bytes, tmp_path: Path) -> None:
    found = read_file_settings(_saved(tmp_path / f"a{suffix}", comment=comment))
    assert (found["prompt"], found["negative_prompt"], found["seed"]) == ("a dog on grass", "blurry", 99)
    assert (found["steps"], found["guidance"], found["width"], found["height"]) == (20, 7, 512, 768)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_graphs_of_comfyui_and_jsons_of_swarmui(suffix: str, tmp_path: Path) -> None:
    fields = {0x0110: f"prompt:{json.dumps(GRAPH)}", 0x010F: "workflow:{}"}
    found = read_file_settings(_saved(tmp_path / f"a{suffix}", fields=fields))
    assert (found["prompt"], found["seed"], found["steps"], found["guidance"]) == ("a red fox", 5, 9, 4.5)
    swarm = json.dumps({"sui_image_params": {"prompt": "a cat", "seed": 3}}).encode()
    assert read_file_settings(_saved(tmp_path / f"b{suffix}", comment=swarm))["prompt"] == "a cat"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_mm_writes_itself(suffix: str, tmp_path: Path) -> None:
    settings = {"prompt": "a réd star", "seed": 7, "steps": 4, "mode": "flow", "model": "mm-tiny"}
    file = tmp_path / f"a{suffix}"
    file.write_bytes(picture_bytes(Image.new("RGB", (16, 16)), settings, suffix))
    assert read_file_settings(file) == settings | {"width": 16, "height": 16}


def test_pictures_without_settings(tmp_path: Path) -> None:
    camera = _saved(tmp_path / "a.jpg", fields={0x010F: "Canon", 0x0110: "EOS: 5"}, comment=b"ASCII\0\0\0")
    for path in (camera, _saved(tmp_path / "b.webp")):
        with pytest.raises(UserError, match="carries no settings"):
            read_file_settings(path)
        assert provenance(path).settings is None
    broken = _saved(tmp_path / "c.webp", fields={0x0110: "prompt:{not json"})
    assert "prompt" in provenance(broken).why_no_settings


def test_a_hostile_file_garbles_no_terminal(tmp_path: Path) -> None:
    """Escapes, lone surrogates, line ends and values that JSON lacks."""
    wild = {"prompt": "a\x1b[31m star\nfingerprint: 0x1\ud800", "other": {"x": ["\x07"]}, "seed": 7}
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("mm", json.dumps(wild))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", pnginfo=chunks)
    lines = PngImagePlugin.PngInfo()
    lines.add_text("parameters", "x" * 5000 + "\nSteps: 3, Seed: 4, Odd: [NaN, Infinity]")
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png", pnginfo=lines)
    for name in ("a", "b"):
        out = tmp_path / f"{name}.json"
        done = CliRunner().invoke(mm.cli.app, ["provenance", str(tmp_path / f"{name}.png"), "--json", str(out)])
        assert done.exit_code == 0, done.output
        shown = done.stdout.splitlines()
        assert len(shown) == 3 and all(line.isprintable() and len(line) < 3000 for line in shown)
        json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert json.loads((tmp_path / "b.json").read_text())["settings"]["other"]["Odd"] == [None, None]


def _chunk(kind: bytes, data: bytes, *, check: int | None = None) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check or zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (_chunk(b"tEXt", b"mm\0{}", check=1), "damaged"),
        (_chunk(b"tEXt", b"mm\0{"), "JSON"),
        (_chunk(b"zTXt", b"mm\0\0" + zlib.compress(bytes(9 << 20))), "8388608 bytes"),
    ],
    ids=["checksum", "json", "huge"],
)
def test_damaged_and_huge_chunks(chunk: bytes, message: str, tmp_path: Path) -> None:
    """The rest is still said: pixels are read, and a reason stands where the settings would."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    try:
        found: Any = provenance(tmp_path / "a.png")
    except UserError as error:  # Pillow itself refuses a text with a wrong checksum
        assert "cannot be read as a picture" in str(error)
        return
    assert found.settings is None and message in found.why_no_settings
