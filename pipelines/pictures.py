"""Opens pictures of any mode, size and rotation, and makes them tensors.

Design choices
- The shorter side is scaled to the model's size and the middle is cut out. Borders around the whole picture would be
  read as a background; a picture of the right size comes through unchanged.
- EXIF rotation is obeyed. What a file may be is checked by `mm.core.pictures`, which also puts transparency on white.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from mm.core.errors import UserError
from mm.core.pictures import flattened, read_picture


def open_picture(source: Any) -> Image.Image:
    """RGB from a path or a PIL picture of any mode. Raises UserError for what is no picture."""
    try:
        picture = ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else read_picture(source)
        return flattened(picture)
    except UserError:
        raise
    except (OSError, UnidentifiedImageError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise UserError(f"{source} cannot be read as a picture ({error})") from error


def squared(picture: Image.Image, size: int) -> Image.Image:
    """The middle of the picture, `size` x `size`."""
    if picture.size == (size, size):
        return picture
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def to_tensor(pictures: list[Image.Image], size: int) -> torch.Tensor:
    """Pictures (B, 3, size, size) in [-1, 1]."""
    rows = [np.asarray(squared(open_picture(p), size)) for p in pictures]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1
