"""Pictures from outside: PNG, JPEG and WebP by content, with limits checked before anything is decoded.

Design choices
- Pillow is asked for three formats only. Without that list a PostScript file named .png is run by Ghostscript.
- The number of pixels is limited before decoding: a file of some KB can stand for gigabytes.
- Of an animation, and of JPEGs that hold several pictures (MPO, from phones), the first one is taken.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mm.core.errors import UserError, shown
from mm.core.files import open_regular

FORMATS = ("PNG", "JPEG", "WEBP")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")  # in which pipelines give their pictures
MAX_PIXELS = 50_000_000  # 4 bytes each once decoded, and up to four copies while transparency is taken out
MAX_FRAMES = 1000
MAX_BYTES = 256 << 20


def check_output_type(options: Mapping[str, Any], *, file: bool = False) -> None:
    """Raises UserError for an `output_type` in a pipeline's options that none gives.

    Args:
        options: of a call, by name.
        file: whether the pictures go into files, which hold PIL pictures alone.
    """
    given = options.get("output_type", "pil")
    if file and given != "pil":
        raise UserError(f"output_type is {shown(given)}, and files hold PIL pictures alone; leave it out")
    if given not in OUTPUT_TYPES:
        raise UserError(f"output_type is {shown(given)}; give {', '.join(OUTPUT_TYPES)}, or leave it out")


def read_picture(path: str | os.PathLike[str], *, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A picture from a file, decoded and turned as its EXIF data say.

    Args:
        path: a regular file, of any suffix.
        formats: Pillow's names of the formats that are read.

    Returns:
        A PIL picture of any mode. The file is closed.

    Raises:
        UserError: for a file that is missing, no regular file, too large, of another format or damaged.
    """
    where = Path(path)
    with open_regular(where, "picture", most=MAX_BYTES) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower, and an error
        try:
            _check_pixels(_webp_size(file.read(30)), where)  # Pillow allocates a WebP's pixels while it opens it
            file.seek(0)
            with Image.open(file, formats=formats) as picture:
                _check_pixels(picture.size, where)
                frames = getattr(picture, "n_frames", 1)
                if frames > MAX_FRAMES:
                    raise UserError(f"{where} has {frames} frames; at most {MAX_FRAMES} are read, give one picture")
                picture.load()
                return ImageOps.exif_transpose(picture)
        except UserError:
            raise
        except Image.DecompressionBombError as error:  # far above our limit
            raise UserError(
                f"{where} has more than {MAX_PIXELS} pixels, the most that are read; make it smaller"
            ) from error
        except Image.UnidentifiedImageError as error:
            kinds = " or ".join(formats)
            raise UserError(f"{where} cannot be read as a picture (it is no {kinds} file)") from error
        except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
            raise UserError(f"{where} cannot be read as a picture ({' '.join(str(error).split())[:200]})") from error


def flattened(picture: Image.Image) -> Image.Image:
    """The picture in RGB: transparency lies on white, greys of 16 bits count over their whole range, and values of
    other ranges are spread over 0 to 255."""
    picture = _of_8_bits(picture)
    if _has_alpha(picture):
        return _laid_on("white", picture)
    if picture.mode in ("I", "F"):
        low, high = (float(value) for value in picture.convert("F").getextrema())  # type: ignore[arg-type]
        factor = 255 / max(high - low, 1e-9)
        picture = picture.convert("F").point(lambda value: value * factor - low * factor).convert("L")
    return picture.convert("RGB")


def as_mask(picture: Image.Image) -> Image.Image:
    """A mask in grey: white counts, and what is transparent does not, since nothing was painted there."""
    picture = _of_8_bits(picture)
    return (_laid_on("black", picture) if _has_alpha(picture) else picture).convert("L")


def _of_8_bits(picture: Image.Image) -> Image.Image:
    """Greys of 16 bits as greys of 8, which Pillow would clip; any other picture as it is."""
    if picture.mode != "I;16":
        return picture
    values = np.asarray(picture).astype(np.uint32)
    made = Image.fromarray((values // 257).astype(np.uint8))
    clear = picture.info.get("transparency")  # the one value that is transparent
    if isinstance(clear, int):
        made.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return made


def alpha_of(picture: Image.Image) -> Image.Image | None:
    """The alpha channel in grey; None for a picture without transparency."""
    picture = _of_8_bits(picture)
    return picture.convert("RGBA").getchannel("A") if _has_alpha(picture) else None


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def _laid_on(colour: str, picture: Image.Image) -> Image.Image:
    clear = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, colour), clear).convert("RGB")


def _check_pixels(size: tuple[int, int], where: Path) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        shape = f"{size[0]} x {size[1]}"
        raise UserError(f"{where} has more than {MAX_PIXELS} pixels ({shape}), the most that are read; make it smaller")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height by the first 30 bytes of a WebP file (RFC 9649); (0, 0) for any other file."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 0, 0
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", head[26:30])
    return width & 0x3FFF, height & 0x3FFF
