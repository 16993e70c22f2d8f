"""Opens pictures of any mode, size and rotation, and makes them tensors.

Design choices
- The shorter side is scaled to the model's size and the middle is cut out. Borders around the whole picture would be
  read as a background; a picture of the right size comes through unchanged.
- EXIF rotation is obeyed, and transparency lies on white. What a file may be is checked by `mm.core.pictures`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from mm.core.errors import UserError
from mm.core.pictures import read_picture


def open_picture(source: Any) -> Image.Image:
    """RGB from a path or a PIL picture of any mode. Raises UserError for what is no picture."""
    try:
        picture = ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else read_picture(source)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            clear = picture.convert("RGBA")
            white = Image.new("RGBA", clear.size, "white")
            return Image.alpha_composite(white, clear).convert("RGB")
        if picture.mode in ("I", "I;16", "F"):
            values = np.asarray(picture, dtype=np.float32)
            spread = max(float(values.max() - values.min()), 1e-9)
            picture = Image.fromarray(((values - values.min()) / spread * 255).astype(np.uint8))
        return picture.convert("RGB")
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
