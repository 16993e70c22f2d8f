"""Files from outside: what is wrong is said in one line that names file, key and value, before anything is read."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file

from mm.core.errors import UserError, shown
from mm.core.files import check_new, open_regular, read_regular, write_bytes
from mm.core.pictures import MAX_PIXELS, alpha_of, as_mask, flattened, read_picture
from mm.core.safe_json import Fields, parse_json, read_json, read_json_lines
from mm.core.safe_tensors import Limits, is_finite, read_header, read_tensors, tensor_bytes


def _packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write knows no name of its own."""
    (tmp_path / "a").write_bytes(b"old")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(tmp_path / "a", b"new")
    assert caught.value.filename == str(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "pipe", "no regular file"), (tmp_path, "is a folder"), ("/dev/zero", "no regular")):
        for read in (open_regular, read_tensors, read_picture, read_json):
            with pytest.raises(UserError, match=why):
                read(path)
    with pytest.raises(UserError, match="no JSON file at"):
        read_json(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be opened"):
        read_json("a\0b")


def test_a_link_is_followed_and_a_size_limited(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_regular(tmp_path / "b", most=5) == b"12345"
    with pytest.raises(UserError, match="has 5 bytes; a file may have at most 4"):
        read_regular(tmp_path / "b", most=4)


def test_values_in_messages_are_one_short_line_of_ascii() -> None:
    for value in ("a\nb\x1b[31m\ud800é" * 50, ["x"] * 1000, {"a": "b\n"}, 10**5000, object(), float("nan"), None):
        text = shown(value)
        assert len(text) <= 60 and text.isascii() and text.isprintable()
    assert shown("two\nlines") == '"two\\nlines"'


def test_a_message_is_one_line_that_prints() -> None:
    text = str(UserError("no layer a\nb\x7f\ud800 " + "x" * 5000 + " take another"))
    assert text.isprintable() and len(text) <= 1420 and text.endswith("take another")
    assert text.startswith("no layer a b\\x7f\\ud800 x")
    assert str(UserError("é plain")) == "é plain" and str(UserError()) == ""


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"{", "no JSON at column 2"),
        (b"{\n", "no JSON at line 2, column 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 70 + b"]" * 70, "nested too deeply; at most 64"),
        (b'{"a": 1, "b": 2, "a": 3}', 'gives the key "a" twice'),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "more than 40 digits"),
        (rb'{"a": "\ud800"}', "lone surrogate"),
        (rb'{"\udfff": 1}', "lone surrogate"),
        (b"[" + b"0," * 2_000_000 + b"0]", "more than 2000000 values"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_json_is_read_strictly(text: bytes, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        parse_json(text, "f.json")
    assert str(caught.value).startswith("f.json ") and "\n" not in str(caught.value)


def test_sound_json_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, "\\ud83d\\ude00", null]}', "f") == {
        "a": [1, 2.5, "\U0001f600", None]
    }
    assert parse_json("[" * 64 + "]" * 64, "f")
    assert parse_json("18446744073709551615", "f") == 2**64 - 1


def test_json_is_measured_before_it_is_parsed() -> None:
    with pytest.raises(UserError, match="has 11 bytes of JSON; at most 10"):
        parse_json("[" * 11, "f", most=10)


def test_json_lines_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_json_lines(file)) == [(1, {"a": 1}), (3, {"a": 2})]
    for text, why in (('{"a": 1}\n[1]\n', "line 2 holds"), ('{"a": "' + "x" * 99, "line 1 is longer than 50 bytes")):
        file.write_text(text)
        with pytest.raises(UserError, match=why):
            list(read_json_lines(file, most=50))


def test_fields_name_file_key_and_value() -> None:
    fields = Fields({"a": {"n": True, "x": "1", "kind": "odd", "list": [1]}}, "f.json").fields("a")
    wanted = [
        (lambda: fields.whole("n", 0, 5), "f.json: a.n is true; a whole number from 0 to 5 is needed"),
        (lambda: fields.number("x", 0, 1), 'f.json: a.x is "1"; a number from 0 to 1 is needed'),
        (lambda: fields.choice("kind", ("lowrank", None)), 'a.kind is "odd"; one of "lowrank", null'),
        (lambda: fields.text("none"), "a.none is missing; a text"),
        (lambda: fields.texts("list"), r"a.list is \[1\]; a list"),
        (lambda: fields.only(["n", "x"]), 'unknown key "kind" in a; known are n, x'),
        (lambda: fields.fields("x"), 'a.x is "1"; an object'),
        (lambda: Fields([], "f.json"), r"the JSON is \[\]; an object"),
    ]
    for call, why in wanted:
        with pytest.raises(UserError, match=why):
            call()
    assert fields.flag("n") and fields.text("x") == "1" and fields.whole("none", 0, 9, default=3) == 3


# ---- safetensors -----------------------------------------------------------------------------------------------------


def test_sound_tensors_are_read(tmp_path: Path) -> None:
    given = {
        "w": torch.randn(3, 4),
        "h": torch.randn(5).bfloat16(),
        "s": torch.tensor(2.0),
        "q": torch.randn(4).to(torch.float8_e4m3fn),
    }
    save_file(given, tmp_path / "a", metadata={"k": "v"})
    read = read_tensors(tmp_path / "a")
    assert read.metadata == {"k": "v"} and set(read.tensors) == set(given)
    assert all(
        torch.equal(read.tensors[n].float(), t.float()) and read.tensors[n].dtype == t.dtype for n, t in given.items()
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no header"),
        (b"\x05\0\0\0\0\0\0\0ab", "no header"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "no header"),
        (b"PK\x03\x04" + bytes(99), "it is pickled"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a pointer of Git LFS; download"),
        (b"<!DOCTYPE html><html></html>", "it is a web page; download"),
        (_packed(b"[1, 2]   "), "no JSON object"),
        (_packed(b'{"a":' * 9000), "nested too deeply|no JSON"),
        (_packed(b'{"w": 1, "w": 2}'), 'the key "w" twice'),
        (_packed({"w": 3}), '"w" is 3'),
        (_packed({"w": _entry(dtype="F31")}), 'type "F31"'),
        (_packed({"w": _entry(dtype=["F32"])}), "type"),
        (_packed({"w": _entry(shape=[-2])}, b"x" * 8), "shape"),
        (_packed({"w": _entry(shape=[True, 2])}, b"x" * 8), "shape"),
        (_packed({"w": _entry(shape=[1] * 9 + [2])}, b"x" * 8), "shape"),
        (_packed({"w": _entry(shape=[10**9, 10**9])}, b"x" * 8), "8 bytes for type F32"),
        (_packed({"w": _entry(offsets=[0, 10**15], shape=[10**15 // 4])}, b"x" * 8), "8 bytes of tensors where"),
        (_packed({"w": _entry(offsets=[8, 16])}, b"x" * 16), "begins at byte 8 of the data, not 0"),
        (_packed({"w": _entry(), "v": _entry()}, b"x" * 8), "begins at byte 0 of the data, not 8"),
        (_packed({"w": _entry()}, b"x" * 9), "9 bytes of tensors where its header describes 8"),
        (_packed({"__metadata__": {"a": 1}, "w": _entry()}, b"x" * 8), "__metadata__"),
        (_packed({"w": _entry(dtype="I32")}, bytes(8)), "type I32"),
        (_packed({"w": _entry(dtype="BOOL", shape=[8])}, bytes(8)), "type BOOL"),
        (_packed({"w": _entry(shape=[0, 4], offsets=[0, 0])}), "no values"),
        (save({"w": torch.tensor([1.0, float("nan")])}), '"w" holds NaN'),
        (save({"w": torch.tensor([1.0, float("-inf")]).half()}), '"w" holds NaN or infinite'),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_damaged_tensor_files_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=why) as caught:
        read_tensors(tmp_path / "a")
    assert str(caught.value).startswith(str(tmp_path / "a")) and "\n" not in str(caught.value)


def test_tensors_of_any_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    given = {"a": whole, "again": whole, "turned": whole.T, "row": whole[1], "rows": whole[1:]}
    (tmp_path / "a").write_bytes(tensor_bytes(given, {"key": "text"}))
    read = read_tensors(tmp_path / "a")
    assert read.metadata == {"key": "text"} and all(torch.equal(read.tensors[k], given[k]) for k in given)


def test_limits_hold_before_anything_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "a")
    for limits, why in ((Limits(tensors=1), "2 tensors"), (Limits(bytes=31), "32 bytes"), (Limits(header=9), "header")):
        with pytest.raises(UserError, match=why):
            read_header(tmp_path / "a", limits=limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float64])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 37, 1000):
            values = torch.ones(1001)
            assert is_finite(values.to(dtype))
            values[place] = bad
            assert not is_finite(values.to(dtype))


# ---- pictures --------------------------------------------------------------------------------------------------------


def _png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that stands for a picture of any size, one bit a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_known_by_content_and_turned(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.txt", kind, exif=exif)
    assert read_picture(tmp_path / "a.txt").size == (4, 8)


@pytest.mark.parametrize("size", [(13300, 13300), (2**31 - 1, 2), (MAX_PIXELS + 1, 1)])
def test_pixels_are_counted_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(_png_of(*size))
    with pytest.raises(UserError, match=f"more than {MAX_PIXELS} pixels"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    "head",
    [
        b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") + (16382).to_bytes(3, "little"),
        b"VP8L" + struct.pack("<I", 10) + b"/" + (16382 | 16382 << 14).to_bytes(4, "little") + bytes(5),
        b"VP8 " + struct.pack("<I", 10) + b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383),
    ],
)
def test_a_huge_webp_is_refused_before_it_is_opened(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "a.webp").write_bytes(b"RIFF" + struct.pack("<I", 40) + b"WEBP" + head + bytes(30))
    with pytest.raises(UserError, match=r"pixels \(16383 x 16383\)"):
        read_picture(tmp_path / "a.webp")


def test_other_formats_are_refused_and_first_frames_taken(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(UserError, match=r"cannot be read as a picture \(it is no PNG or JPEG or WEBP file"):
        read_picture(tmp_path / "a.png")
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("PNG", "WEBP"):
        frames[0].save(tmp_path / "b", kind, save_all=True, append_images=frames[1:])
        assert read_picture(tmp_path / "b").convert("RGB").getpixel((4, 4))[0] > 200  # the first
    frames[0].save(tmp_path / "c", "MPO", save_all=True, append_images=frames[1:])  # a phone's photograph
    assert read_picture(tmp_path / "c").getpixel((4, 4))[0] > 200
    Image.new("RGB", (64, 64)).save(tmp_path / "d", "PNG")
    (tmp_path / "d").write_bytes((tmp_path / "d").read_bytes()[:-30])
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_picture(tmp_path / "d")


def test_a_mask_is_white_where_something_white_was_painted() -> None:
    layer = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (2, 2, 4, 4))
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert as_mask(layer).getbbox() == (2, 2, 4, 4) and as_mask(layer).mode == "L"
    assert as_mask(layer.convert("LA")).getbbox() == (2, 2, 4, 4)
    assert as_mask(layer.convert("P", palette=Image.Palette.ADAPTIVE)).mode == "L"
    assert list(as_mask(deep).tobytes()) == [0, 127, 255]
    assert as_mask(Image.new("1", (2, 2), 1)).tobytes() == bytes([255] * 4)


def test_greys_of_16_bits_count_over_their_whole_range(tmp_path: Path) -> None:
    """Spread between their darkest and lightest, a dim picture would become a bright one."""
    dim = Image.fromarray(np.array([[0, 257 * 40, 257 * 80]], np.uint16))
    dim.save(tmp_path / "a.png", transparency=257 * 40)
    read = read_picture(tmp_path / "a.png")
    assert list(flattened(dim).getchannel(0).tobytes()) == [0, 40, 80]
    assert list(flattened(read).getchannel(0).tobytes()) == [0, 255, 80]
    alpha = alpha_of(read)
    assert alpha is not None and list(alpha.tobytes()) == [255, 0, 255] and alpha_of(dim) is None


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """As root, a rename would put a file in the place of /dev/full."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(os.devnull)
    for place in (pipe, tmp_path / "link"):
        with pytest.raises(UserError, match="is no regular file"):
            check_new(place, force=True)
        with pytest.raises(UserError, match="is no regular file"):
            write_bytes(place, b"x")
    assert pipe.is_fifo() and (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2
