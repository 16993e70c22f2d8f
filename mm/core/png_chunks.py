"""Text chunks of PNG files, without decoding the picture.

Design choices
- Chunks are walked by their lengths (PNG specification, third edition, 5.3); only text chunks are read, wherever they
  stand. So a file of any number of pixels costs nothing, and the memory is bounded by the limits below.
- Compressed text is inflated up to the limit and no further: 1 KB can stand for 1 MB.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import BinaryIO

from mm.core.errors import UserError
from mm.core.files import open_regular

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_FILE = 1 << 30
MAX_TEXT = 8 << 20  # bytes of all text chunks of a file, inflated; workflows of ComfyUI reach some hundred KB
MAX_CHUNKS = 200_000
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text chunks of a PNG file.

    Args:
        path: a regular file, of any suffix.

    Returns:
        Text by keyword; of chunks with one keyword, the last.

    Raises:
        UserError: where the file is missing, no PNG, cut off, or its text exceeds the limits.
    """
    where = Path(path)
    try:
        with open_regular(where, "PNG file", most=MAX_FILE) as file:
            if file.read(8) != SIGNATURE:
                raise UserError(f"{where} is no readable PNG (it does not begin as one)")
            return _walk(file, where)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or error})") from error


def _walk(file: BinaryIO, where: Path) -> dict[str, str]:
    """Reads chunk after chunk up to IEND."""
    texts: dict[str, str] = {}
    left, size = MAX_TEXT, os.fstat(file.fileno()).st_size
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or file.tell() + length + 4 > size:
            raise UserError(f"{where} is no readable PNG (it ends within a chunk)")
        if kind == b"IEND":
            return texts
        if kind not in _TEXTS:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        if length > left:
            raise UserError(f"{where} holds more than {MAX_TEXT} bytes of text, the most that is read")
        data, check = file.read(length), int.from_bytes(file.read(4), "big")
        if zlib.crc32(kind + data) != check:
            raise UserError(f"{where} is no readable PNG (its text is damaged: wrong checksum)")
        keyword, text = _text(kind, data, left, where)
        left -= len(text)
        texts[keyword] = text
    raise UserError(f"{where} is no readable PNG (it has more than {MAX_CHUNKS} chunks)")


def _text(kind: bytes, data: bytes, left: int, where: Path) -> tuple[str, str]:
    """Keyword and text of a chunk (PNG specification, 11.3.3)."""
    keyword, found, rest = data.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:]  # a flag and a method, then language and translated keyword
        _, found, rest = rest.partition(b"\0")
        _, found, rest = rest.partition(b"\0") if found else (b"", b"", b"")
    elif packed:
        rest = rest[1:]  # the method
    if not found:
        raise UserError(f"{where} is no readable PNG (a text chunk has no keyword or no text)")
    if packed:
        rest = _inflated(rest, left, where)
    name = keyword.decode("latin-1")
    if kind != b"iTXt":
        return name, rest.decode("latin-1")
    try:
        return name, rest.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no readable PNG (its text is not UTF-8)") from error


def _inflated(data: bytes, left: int, where: Path) -> bytes:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, left + 1)
    except zlib.error as error:
        raise UserError(f"{where} is no readable PNG (its compressed text is damaged)") from error
    if len(text) > left:
        raise UserError(f"{where} holds more than {MAX_TEXT} bytes of text, the most that is read")
    return text
