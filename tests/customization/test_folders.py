"""What lies in a folder of training pictures: nothing is left out without a word, and odd pictures are read right."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from subject_pictures import subject_folder

from mm.core.errors import UserError
from mm.customization.captions import names, renamed
from mm.customization.data import read_folder, read_regularization


def _warned(folder: Path, **given: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_folder(folder, **{"name": "<mug>", **given})
    return [str(one.message) for one in caught]


def test_what_is_not_used_is_named_once_a_kind(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path / "data", 2)
    for name in ("a.heic", "b.tiff", "metadata.jsonl"):
        (folder / name).write_bytes(b"x")
    (folder / "9-masklabel.png").write_bytes(b"x")
    subject_folder(folder / "more", 1)
    (folder / "broken.png").symlink_to(folder / "missing.png")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "notes").mkdir()
    said = _warned(folder)
    assert len(said) == 3
    assert any("a.heic (and 3 more) is not used" in line for line in said)
    assert any("9-masklabel.png has no picture" in line for line in said)
    assert any("more holds pictures that are not used" in line and "1_NAME" in line for line in said)
    assert _warned(subject_folder(tmp_path / "plain", 2)) == []


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.heic", "b.heic"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no picture .*; it holds a\.heic and 1 more"):
        read_folder(tmp_path, name="<mug>")


@pytest.mark.parametrize("folder", ["0_mug", "20261127_mug", "99999999999999999999999_mug"])
def test_repeats_out_of_range(folder: str, tmp_path: Path) -> None:
    subject_folder(tmp_path / "data" / folder, 1)
    with pytest.raises(UserError, match=r"repeats; give 1 to 10000"):
        read_folder(tmp_path / "data", name="<mug>")


def test_repeats_are_those_of_folders_inside_the_given_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in kohya's scripts; the name of the given folder, a year perhaps, says nothing."""
    root = subject_folder(tmp_path / "2026_mug", 1)
    subject_folder(root / "10_mug", 1)
    assert [one.repeats for one in read_folder(root, name="<mug>")] == [1, 10]
    assert [one.repeats for one in read_folder(root / "10_mug", name="<mug>")] == [1]
    monkeypatch.chdir(root / "10_mug")
    assert [one.repeats for one in read_folder(".", name="<mug>")] == [1]
    plain = subject_folder(tmp_path / "2026_class", 1, captions=False)
    assert [one.repeats for one in read_regularization(plain, noun="mug")] == [1]


def test_captions_of_other_suffixes_and_cases(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path, 4, captions=False)
    (folder / "0.TXT").write_bytes(b"\xef\xbb\xbfa [Trigger]\r\non grass \r\n")
    (folder / "1.caption").write_text("a <MUG> in snow")
    (folder / "2.txt").write_text("two [TRIGGER]s and a [trigger]")
    (folder / "3.txt").write_text("\n")
    assert [e.caption for e in read_folder(folder, name="<mug>")] == [
        "a <mug> on grass", "a <mug> in snow", "two <mug>s and a <mug>", "a photo of a <mug>",
    ]  # fmt: skip


def test_a_name_is_a_whole_word(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path, 2, captions=False)
    (folder / "0.txt").write_text("a catalogue on grass")
    (folder / "1.txt").write_text("my Cat, asleep")
    assert [e.caption for e in read_folder(folder, name="cat")] == ["cat, a catalogue on grass", "my cat, asleep"]
    assert renamed("a cat and a catalogue, Cat", "cat", "dog") == "a dog and a catalogue, dog"
    assert names("<mug>s", "<mug>") and not names("a mugs", "mug") and not names("anything", "")


def _deep(folder: Path) -> None:
    """Grey of 16 bits from 0 to 32767, which is half of its range."""
    values = np.tile(np.linspace(0, 32767, 32).astype(np.uint16), (32, 1))
    Image.fromarray(values).save(folder / "0.png")


def _cmyk(folder: Path) -> None:
    Image.new("RGB", (32, 32), (200, 40, 40)).convert("CMYK").save(folder / "0.jpg", quality=95)


def _palette(folder: Path) -> None:
    Image.new("RGB", (32, 32), (200, 40, 40)).quantize(8).save(folder / "0.png")


def _animated(folder: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((200, 40, 40), (0, 0, 255))]
    frames[0].save(folder / "0.webp", save_all=True, append_images=frames[1:], lossless=True)


def _turned(folder: Path) -> None:
    picture = Image.new("RGB", (48, 32), (200, 40, 40))
    picture.paste((0, 0, 255), (0, 0, 8, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right: what is left comes up
    picture.save(folder / "0.png", exif=exif)


@pytest.mark.parametrize(
    ("make", "size", "middle"),
    [
        (_deep, (32, 32), (64, 64, 64)), (_cmyk, (32, 32), (200, 40, 40)), (_palette, (32, 32), (200, 40, 40)),
        (_animated, (32, 32), (200, 40, 40)), (_turned, (32, 48), (200, 40, 40)),
    ],
)  # fmt: skip
def test_pictures_of_all_modes(make: Any, size: tuple[int, int], middle: tuple[int, ...], tmp_path: Path) -> None:
    make(tmp_path)
    (example,) = read_folder(tmp_path, name="<mug>")
    assert example.picture.mode == "RGB" and example.picture.size == size and example.mask is None
    at = example.picture.getpixel((size[0] // 2, size[1] // 2))
    assert isinstance(at, tuple)
    assert all(abs(a - b) <= 6 for a, b in zip(at, middle, strict=True)), at
    if make is _turned:
        assert example.picture.getpixel((16, 2)) == (0, 0, 255)


def test_a_mask_outside_of_what_is_learned(tmp_path: Path) -> None:
    """Of a wide picture the middle square is learned; a mask that is white beside it would teach nothing."""
    Image.new("RGB", (96, 32), "red").save(tmp_path / "0.png")
    mask = Image.new("L", (96, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "0-masklabel.png")
    with pytest.raises(UserError, match="black in the middle square"):
        read_folder(tmp_path, name="<mug>")
    deep = np.zeros((32, 96), np.uint16)
    deep[:, 32:64] = 65535
    Image.fromarray(deep).save(tmp_path / "0-masklabel.png")
    (example,) = read_folder(tmp_path, name="<mug>")
    assert example.mask is not None
    assert np.asarray(example.mask)[16, 48] == 255 and np.asarray(example.mask)[16, 16] == 0


# ---- pairs ----------------------------------------------------------------------------------------------------------


def _pair(folder: Path, stem: str, *, sides: tuple[str, ...] = ("before", "after"), end: str = ".png") -> None:
    for side in sides:
        Image.new("RGB", (32, 32), "red").save(folder / f"{stem}_{side}{end}")


def test_pairs_that_are_not_whole(tmp_path: Path) -> None:
    _pair(tmp_path, "a")
    _pair(tmp_path, "b", sides=("before",))
    with pytest.raises(UserError, match=r"b_before\.png has no partner"):
        read_folder(tmp_path, name="redden", kind="edit")
    _pair(tmp_path, "b", sides=("after",))
    _pair(tmp_path, "b", sides=("after",), end=".jpg")
    with pytest.raises(UserError, match=r"b_after\.jpg and .*b_after\.png have one name"):
        read_folder(tmp_path, name="redden", kind="edit")
    (tmp_path / "b_after.jpg").unlink()
    Image.new("L", (32, 32), 255).save(tmp_path / "a_after-masklabel.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "c.png")
    Image.new("RGB", (64, 32)).save(tmp_path / "b_before.png")
    (tmp_path / "a.txt").write_text("make it [trigger]")
    (tmp_path / "b_before.txt").write_text("a word that nobody reads")
    said = _warned(tmp_path, name="redden", kind="edit")
    assert len(said) == 3
    assert any("different shapes" in line for line in said) and any("c.png is not used" in line for line in said)
    assert any("b_before.txt is no text or mask of a pair" in line for line in said)
    pairs = read_folder(tmp_path, name="redden", kind="edit")
    assert [one.caption for one in pairs] == ["make it redden", "redden"]
    assert pairs[0].mask is not None and pairs[1].mask is None


def test_regularization_pictures_do_not_name_the_subject(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path, 1, captions=False)
    for caption in ("a photo of a [Trigger]", "a photo of a <mug> cup"):
        (folder / "0.txt").write_text(caption)
        with pytest.raises(UserError, match="names the subject"):
            read_regularization(folder, noun="cup", name="<mug>")
    (folder / "0.txt").write_text("a photo of a cup")
    assert read_regularization(folder, noun="", name="<mug>")[0].caption == "a photo of a cup"


def test_a_mask_painted_on_a_transparent_layer(tmp_path: Path) -> None:
    """Nothing is painted where it is transparent, so that the loss does not count there."""
    folder = subject_folder(tmp_path / "p", 1)
    layer = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (8, 8, 24, 24))
    layer.save(folder / "0-masklabel.png")
    (example,) = read_folder(folder, name="<mug>")
    assert example.mask is not None and example.mask.getbbox() == (8, 8, 24, 24)
    (folder / "0-masklabel.png").rename(folder / "0-masklabel.webp")
    assert any("masks are called NAME-masklabel.png" in line for line in _warned(folder))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_caption_in_utf_16_without_a_mark(encoding: str, tmp_path: Path) -> None:
    """It is valid UTF-8 with a NUL behind each letter, of which no word is left."""
    folder = subject_folder(tmp_path / "p", 1)
    (folder / "0.txt").write_bytes("a [trigger] on grass".encode(encoding))
    with pytest.raises(UserError, match=r"0\.txt holds '\\x00'.*UTF-16.*; save the caption as UTF-8"):
        read_folder(folder, name="<mug>")
