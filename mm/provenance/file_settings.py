"""The settings that a picture's file carries: text chunks of PNG, Exif fields of JPEG and WebP.

A1111's web UI and Forge write their text into the Exif field UserComment, SwarmUI its JSON. ComfyUI writes its graphs
into the fields Make and Model, each behind its name: "prompt:{...}", "workflow:{...}". mm writes its JSON into the
field ImageDescription in the same way: "mm:{...}".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from mm.core.errors import UserError
from mm.core.files import open_regular
from mm.core.foreign_settings import read_foreign
from mm.core.pictures import FORMATS, MAX_BYTES
from mm.core.png_chunks import MAX_TEXT, SIGNATURE
from mm.core.png_settings import from_a1111, own_settings, read_settings

_CODES = {b"ASCII\0\0\0": "utf-8", b"\0\0\0\0\0\0\0\0": "utf-8", b"UNICODE\0": "utf-16"}  # Exif 3.0, table 10
_GRAPHS = (ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.ImageDescription)


def read_file_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a PNG, JPEG or WebP was drawn with, under mm's names (`mm.core.png_settings`).

    Raises:
        UserError: where the file carries none that are known, or damaged ones.
    """
    with open_regular(path, "picture", most=MAX_BYTES) as file:
        if file.read(len(SIGNATURE)) == SIGNATURE:
            return read_settings(path)
    texts = _texts(Path(path))
    if "mm" in texts:
        return own_settings(texts["mm"], path)
    if "parameters" in texts and not texts["parameters"].lstrip().startswith("{"):
        return from_a1111(texts["parameters"])
    found = read_foreign(texts, str(path)) if texts else None
    if found is None:
        raise UserError(f"{path} carries no settings that are known; it was saved by another program, or without them")
    return found


def _texts(path: Path) -> dict[str, str]:
    """What the Exif fields say, by the keywords of PNG's text chunks."""
    try:
        with open_regular(path, "picture", most=MAX_BYTES) as file, Image.open(file, formats=FORMATS) as picture:
            exif = picture.getexif()
            fields = {int(tag): exif.get(tag) for tag in _GRAPHS}
            comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except UserError:
        raise
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise UserError(f"{path}: its Exif data cannot be read ({' '.join(str(error).split())[:200]})") from error
    texts: dict[str, str] = {}
    for value in fields.values():
        keyword, _, text = value.partition(":") if isinstance(value, str) else ("", "", "")
        if keyword in ("mm", "prompt", "workflow", "parameters"):
            texts[keyword] = text.rstrip("\0")
    if isinstance(comment, bytes | str) and (said := _comment(comment)):
        texts["parameters"] = said
    if sum(map(len, texts.values())) > MAX_TEXT:
        raise UserError(f"{path} holds more than {MAX_TEXT} bytes of text, the most that is read")
    return texts


def _comment(value: bytes | str) -> str:
    """The text of a UserComment, which begins with the name of its code."""
    if isinstance(value, str):
        return value.strip("\0 ")
    code, data = _CODES.get(value[:8]), value[8:]
    if code is None:
        code, data = "utf-8", value
    if code == "utf-16" and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        # The order of bytes is not said; in most texts the high one is 0 more often.
        code = "utf-16-be" if data[::2].count(0) >= data[1::2].count(0) else "utf-16-le"
    return data.decode(code, "replace").strip("\0 ")
