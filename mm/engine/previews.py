"""Rough pictures of latents while a run goes on: the family's linear map from latent channels to colours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm.families.family import Family

Previewer = Callable[[Any, tuple[int, int]], list[Image.Image]]


def previewer(pipe: Any, family: Family | None) -> Previewer | None:
    """A function from latents and (width, height) to small pictures; None where the family knows no map."""
    if family is None or family.preview is None:
        return None
    factors, bias = torch.tensor(family.preview.factors), torch.tensor(family.preview.bias)

    def show(latents: Any, size: tuple[int, int]) -> list[Image.Image]:
        if not isinstance(latents, Tensor):
            return []
        x_BCHW = unpacked(latents.detach().float().cpu(), len(factors), size)
        if x_BCHW is None:
            return []
        rgb = torch.einsum("bchw,cd->bhwd", x_BCHW, factors) + bias
        bytes_BHW3 = ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(one.numpy()) for one in bytes_BHW3]

    return show


def unpacked(latents: Tensor, channels: int, size: tuple[int, int]) -> Tensor | None:
    """Latents as (B, C, H, W): as they are, or from FLUX's rows of 2 x 2 cells; None for another form.

    Args:
        latents: (B, C, H, W), or (B, L, 4 C) with L cells of a picture of `size`.
        channels: C.
        size: width and height in pixels, by whose ratio L is laid out.
    """
    if latents.ndim == 4 and latents.shape[1] == channels:
        return latents
    if latents.ndim != 3 or latents.shape[2] != 4 * channels:
        return None
    cells, (width, height) = latents.shape[1], size
    rows = round((cells * height / width) ** 0.5)
    if rows < 1 or cells % rows:
        return None
    x = latents.reshape(len(latents), rows, cells // rows, channels, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), channels, 2 * rows, 2 * cells // rows)
