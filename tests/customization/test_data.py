"""Folders of training pictures: layouts that are read, and one clear error or warning for each that is wrong."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from subject_pictures import subject_folder

from mm.core.errors import UserError
from mm.customization.data import fill, fingerprint, read_folder, to_tensor


def test_pictures_and_captions(tmp_path: Path) -> None:
    examples = read_folder(subject_folder(tmp_path / "a"), name="<mug>")
    assert [e.path.name for e in examples] == ["0.png", "1.png", "2.png"]
    assert {e.caption for e in examples} == {"a photo of a <mug> on grass"}
    plain = read_folder(subject_folder(tmp_path / "b", captions=False), name="<mug>", noun="cup")
    assert {e.caption for e in plain} == {"a photo of a <mug> cup"}
    style = read_folder(tmp_path / "b", name="<mine>", kind="style")
    assert style[0].caption == "a picture in the style of <mine>"


def test_a_caption_without_the_name_gets_it() -> None:
    assert fill("on a table", "<mug>") == "<mug>, on a table"
    assert fill("a [trigger] and a [trigger]", "<mug>") == "a <mug> and a <mug>"
    assert fill("my <mug> here", "<mug>") == "my <mug> here"


def test_repeats_of_kohyas_folders(tmp_path: Path) -> None:
    subject_folder(tmp_path / "10_mug", 2)
    subject_folder(tmp_path / "3_mug cup", 1)
    assert [e.repeats for e in read_folder(tmp_path, name="<mug>")] == [10, 10, 3]
    assert [e.repeats for e in read_folder(tmp_path / "10_mug", name="<mug>")] == [1, 1]


def test_masks(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path, 2)
    picture = Image.open(folder / "0.png").convert("RGBA")
    picture.putalpha(Image.new("L", picture.size, 0))
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(255, (8, 8, 24, 24))
    picture.putalpha(alpha)
    picture.save(folder / "0.png")
    alpha.save(folder / "1-masklabel.png")
    examples = read_folder(folder, name="<mug>")
    assert len(examples) == 2
    for example in examples:
        assert example.mask is not None
        assert np.array_equal(np.asarray(example.mask), np.asarray(alpha))
    assert examples[0].picture.getpixel((0, 0)) == (255, 255, 255)


def test_pairs_of_an_edit(tmp_path: Path) -> None:
    for side in ("before", "after"):
        subject_folder(tmp_path / side, 2)
    for path in (tmp_path / "after").glob("*.txt"):
        path.write_text("make it [trigger]")
    pairs = read_folder(tmp_path, name="golden", kind="edit")
    assert all(e.before is not None and e.caption == "make it golden" for e in pairs)
    (tmp_path / "before" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png has no partner"):
        read_folder(tmp_path, name="golden", kind="edit")


def test_the_square_in_the_middle() -> None:
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste((255, 255, 255), (10, 0, 30, 20))
    made = to_tensor(picture, 10)
    assert made.shape == (3, 10, 10)
    assert torch.equal(made, torch.ones(3, 10, 10))


def test_the_fingerprint_sees_every_change(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path)
    before = fingerprint(read_folder(folder, name="<mug>"))
    assert before == fingerprint(read_folder(folder, name="<mug>"))
    (folder / "0.txt").write_text("another [trigger]")
    assert before != fingerprint(read_folder(folder, name="<mug>"))


def test_one_unreadable_picture_among_several_is_named_in_a_warning(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path, 10)
    (folder / "4.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"4\.png cannot be read.*the other 9 pictures are used") as caught:
        assert len(read_folder(folder, name="<mug>")) == 9
    assert len(caught) == 1


def test_a_caption_without_a_picture_is_named_in_a_warning(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path)
    (folder / "lost.txt").write_text("a [trigger]")
    with pytest.warns(UserWarning, match=r"lost\.txt has no picture") as caught:
        assert len(read_folder(folder, name="<mug>")) == 3
    assert len(caught) == 1


def _broken(folder: Path) -> None:
    subject_folder(folder, 1)
    (folder / "0.png").write_bytes(b"no picture")


def _two(folder: Path) -> None:
    subject_folder(folder / "10_mug", 1)
    subject_folder(folder / "10_cat", 1)


def _named(folder: Path) -> None:
    subject_folder(folder, 2)
    (folder / "1.txt").write_text("a photo of <cat>")


def _black(folder: Path) -> None:
    subject_folder(folder, 1)
    Image.new("L", (32, 32), 0).save(folder / "0-masklabel.png")


def _other_size(folder: Path) -> None:
    subject_folder(folder, 1)
    Image.new("L", (16, 32), 255).save(folder / "0-masklabel.png")


def _latin(folder: Path) -> None:
    subject_folder(folder, 1)
    (folder / "0.txt").write_bytes(b"caf\xe9")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(exist_ok=True), "holds no picture"),
        (lambda folder: folder.rmdir(), "is no folder"),
        (_broken, "none of 1 picture"),
        (_two, "holds 2 subjects"),
        (_named, "holds two subjects"),
        (_black, "is black everywhere"),
        (_other_size, "give both the same size"),
        (_latin, "no UTF-8"),
    ],
)
def test_wrong_folders_are_one_error(tmp_path: Path, make: object, message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=message):
            read_folder(folder, name="<mug>")
