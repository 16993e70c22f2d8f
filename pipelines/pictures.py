"""Opens pictures of any mode, size and rotation, and makes them tensors.

Design choices
- The shorter side is scaled to the model's size and the middle is cut out. Borders around the whole picture would be
  read as a background; a picture of the right size comes through unchanged.
- EXIF rotation is obeyed. What a file may be is checked by `mm.core.pictures`, which also puts transparency on white.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from mm.core.errors import UserError
from mm.core.pictures import as_mask, flattened, read_picture


def open_picture(source: Any) -> Image.Image:
    """RGB from a path or a PIL picture of any mode. Raises UserError for what is no picture."""
    return _open(source, flattened)


def _open(source: Any, made: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        picture = ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else read_picture(source)
        return made(picture)
    except UserError:
        raise
    except (OSError, UnidentifiedImageError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise UserError(f"{source} cannot be read as a picture ({error})") from error


def as_pictures(source: Any, *, mask: bool = False) -> list[Any]:
    """Pictures of a call, one entry each: paths and PIL pictures as they are, arrays and tensors as PIL pictures.

    Args:
        source: A picture or a list of them; arrays (H, W, C) or (B, H, W, C) and tensors (C, H, W) or (B, C, H, W) of
            bytes, or of numbers in [0, 1], as diffusers takes them.
        mask: Whether this is a mask: it is gray, and its axis of channels may be missing.

    Raises:
        UserError: For arrays of other shapes or values.
    """
    if isinstance(source, (list, tuple)):
        return [picture for one in source for picture in as_pictures(one, mask=mask)]
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        return [_open(source, as_mask)] if mask else [source]
    tensor, kind = isinstance(source, torch.Tensor), type(source).__name__
    if isinstance(source, torch.Tensor):
        values = (source.float() if source.is_floating_point() else source).detach().cpu().numpy()
    else:
        values = source
    if mask and values.ndim == 2:
        values = values[None] if tensor else values[..., None]
    values = values[None] if values.ndim == 3 else values
    values = np.moveaxis(values, 1, -1) if tensor and values.ndim == 4 else values
    if values.ndim != 4 or values.shape[-1] not in (1, 3) or 0 in values.shape:
        axes = "(3, H, W) or (B, 3, H, W)" if tensor else "(H, W, 3) or (B, H, W, 3)"
        raise UserError(f"a picture as {kind} of shape {tuple(source.shape)}; give {axes}")
    if values.dtype != np.uint8:
        if not (np.issubdtype(values.dtype, np.floating) and np.isfinite(values).all()):
            raise UserError(f"a picture as {kind} of {source.dtype}; give bytes, or finite numbers in [0, 1]")
        if values.min() < 0 or values.max() > 1:
            raise UserError(f"a picture with values from {values.min():g} to {values.max():g}; give [0, 1]")
        values = (values * 255).round().astype(np.uint8)
    return [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).convert("RGB") for x in values]


def squared(picture: Image.Image, size: int) -> Image.Image:
    """The middle of the picture, `size` x `size`."""
    if picture.size == (size, size):
        return picture
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def to_tensor(pictures: list[Image.Image], size: int) -> torch.Tensor:
    """Pictures (B, 3, size, size) in [-1, 1]."""
    rows = [np.asarray(squared(open_picture(p), size)) for p in pictures]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1
