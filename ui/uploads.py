"""Pictures that visitors give: read from the upload folder only, within limits, and made smaller before they are kept.

Design choices
- Bytes and pixels are checked in the file's header before anything is decoded, and few are decoded at the same time.
- A message never contains a path of the server.
- Gradio checks that a path lies in its upload folder; it is checked here again, since its check depends on how a
  request describes the file.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.core.pictures import FORMATS, read_picture
from mm.provenance.file_settings import read_file_settings
from mm.ui.limits import MAX_DECODERS, MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS

_decoding = threading.BoundedSemaphore(MAX_DECODERS)


def uploaded(given: object, what: str = "picture") -> Path | None:
    """The file of an upload.

    Args:
        given: a path, or a dict with one under "path", as the page and the API send them; None is no upload.
        what: for messages.

    Raises:
        UserError: for anything but a file in the upload folder.
    """
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if given is None or given == "":
        return None
    path = given.get("path") if isinstance(given, dict) else given
    if not isinstance(path, str) or "\0" in path or len(path) > 4096:
        raise UserError(f"the {what} is no uploaded file; upload it first")
    if path.partition(":")[0].lower() in ("http", "https", "ftp", "file", "data"):
        raise UserError(f"the {what} is given by its address, which is not fetched; upload the file")
    file = Path(path).resolve()
    if not file.is_relative_to(upload_folder()):
        raise UserError(f"the {what} is no uploaded file; upload it first")
    if not file.is_file():
        raise UserError(f"the {what} is no longer on the server; upload it again")
    return file


def upload_folder() -> Path:
    """The folder that uploads are written to."""
    from gradio.utils import get_upload_folder

    return Path(get_upload_folder()).resolve()


def read_upload(given: object, side: int, *, what: str = "picture") -> Image.Image | None:
    """An uploaded picture, at most `side` pixels wide and high.

    Args:
        given: see `uploaded`.
        side: in pixels; a larger picture is made smaller, its proportions stay.
        what: for messages.

    Returns:
        A PIL picture in RGB, or RGBA where it has transparency. None where nothing was given.

    Raises:
        UserError: for a file that is too large, damaged, or no picture.
    """
    file = uploaded(given, what)
    if file is None:
        return None
    if file.stat().st_size > MAX_UPLOAD_BYTES:
        raise UserError(f"the {what} has more than {MAX_UPLOAD_BYTES >> 20} MiB; make it smaller")
    with _decoding:
        try:
            _check_size(file, what)
            picture = read_picture(file)
        except UserError as error:
            raise UserError(_without_path(str(error), file, f"the {what}")) from None
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _check_size(file: Path, what: str) -> None:
    """Pixels by the header, which Pillow reads without decoding."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:
        width, height = MAX_UPLOAD_PIXELS, 2
    except Exception:  # whatever it is, `read_picture` says it better
        return
    if width * height > MAX_UPLOAD_PIXELS:
        most = MAX_UPLOAD_PIXELS // 1_000_000
        raise UserError(f"the {what} has more than {most} million pixels, the most that are read; make it smaller")


def read_painted(given: object, side: int) -> tuple[Image.Image | None, Image.Image | None]:
    """A picture and the mask painted over it, white where something was painted.

    Args:
        given: background and layers as the picture editor sends them.
        side: see `read_upload`.

    Returns:
        The picture, and a mask of its size in mode "L"; None for each that is not there.

    Raises:
        UserError: see `read_upload`.
    """
    if given is None:
        return None, None
    if not isinstance(given, dict) or not isinstance(given.get("layers") or [], list):
        raise UserError("the picture is no uploaded file; upload it first")
    layers = given.get("layers") or []
    if len(layers) > 8:
        raise UserError(f"the mask has {counted(len(layers), 'layer')}; at most 8 are read")
    picture = read_upload(given.get("background"), side)
    if picture is None:
        return None, None
    mask = Image.new("L", picture.size)
    for layer in layers:
        painted = read_upload(layer, side, what="mask")
        if painted is not None and painted.mode == "RGBA":
            alpha = painted.getchannel("A").point([0] * 33 + [255] * 223)
            mask = ImageChops.lighter(mask, alpha.resize(picture.size))
    return picture.convert("RGB"), mask if mask.getbbox() else None


def settings_of_upload(given: object) -> dict[str, Any] | None:
    """The settings in an uploaded picture; None where nothing was given.

    Raises:
        UserError: see `mm.provenance.file_settings.read_file_settings`.
    """
    file = uploaded(given, "picture")
    if file is None:
        return None
    try:
        return read_file_settings(file)
    except UserError as error:
        raise UserError(_without_path(str(error), file, "the picture")) from None


def _without_path(message: str, file: Path, name: str) -> str:
    """A message with a name in place of the server's path."""
    for path in (str(file), file.as_posix(), str(file.parent)):
        message = message.replace(path, name)
    return message
