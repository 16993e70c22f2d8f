"""Where pictures go: numbered files in a folder, or one file, checked before the work and never overwritten unasked.

Design choices
- A file's contents match its suffix: .png, .jpg, .jpeg or .webp; any other suffix is refused.
- PNG files hold the settings as text (`mm.core.png_settings`). JPEG and WebP files hold A1111's text in Exif's
  UserComment, where other programs read it, and all of mm's settings as JSON in its ImageDescription ("mm:{...}").
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from mm.core.errors import UserError
from mm.core.files import check_new, write_bytes, write_new_bytes
from mm.core.png_settings import check_picture, png_bytes, to_a1111

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_OTHERS = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl", ".svg", ".pdf")  # pictures, not folders
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_QUALITY = 95


def picture_bytes(picture: Image.Image, settings: dict[str, Any] | None, suffix: str = ".png") -> bytes:
    """A picture in the format of a suffix, with its settings; None leaves them out.

    Raises:
        UserError: for a suffix that is not known, and for what is no PIL picture.
    """
    check_picture(picture)
    kind = _format(Path(f"x{suffix}"))
    if kind == "PNG":
        return png_bytes(picture, settings)
    exif = Image.Exif()
    if settings is not None:
        settings = settings | {"width": picture.width, "height": picture.height}
        text = to_a1111(settings)
        exif[ExifTags.Base.ImageDescription] = f"mm:{json.dumps(settings, ensure_ascii=True)}"
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    out = io.BytesIO()
    picture.convert("RGB").save(out, kind, quality=_QUALITY, exif=exif)
    return out.getvalue()


def is_picture_file(path: Path) -> bool:
    """Whether a path names one picture rather than a folder."""
    return path.suffix.lower() in (*FORMATS, *_OTHERS) and not path.is_dir()


def check_file(path: Path, *, force: bool = False) -> None:
    """Raises UserError unless a picture can be written to a path.

    Args:
        path: with the suffix of a format that is written.
        force: whether a file that exists may be replaced.
    """
    _format(path)
    check_new(path, force=force)


def save_file(path: Path, picture: Image.Image, settings: dict[str, Any] | None, *, force: bool = False) -> None:
    """Writes one picture, whole or not at all. Raises UserError where it exists, unless `force` is given."""
    data = picture_bytes(picture, settings, path.suffix)
    if force:
        write_bytes(path, data)
        return
    try:
        write_new_bytes(path, data)
    except FileExistsError as error:  # made since it was checked
        raise UserError(f"{path} exists; choose another name, or give --force to replace it") from error


def save_numbered(folder: Path, data: bytes) -> Path:
    """Writes a PNG under the number after the last one in `folder`: 00000.png, 00001.png, ..."""
    while True:
        taken = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()]
        path = folder / f"{max(taken, default=-1) + 1:05d}.png"
        try:
            write_new_bytes(path, data)
        except FileExistsError:  # another command draws into the same folder, and was quicker
            continue
        return path


def _format(path: Path) -> str:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"{path.name} ends in {path.suffix or 'no suffix'}; pictures are written as {', '.join(FORMATS)}"
        )
    return kind
