"""What happens to pictures on their way: JPEG, scaling, cropping. For training and for measuring fingerprints.

Legend: B pictures, H x W pixels; all pictures are in [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Attack = Callable[[Tensor, torch.Generator], Tensor]


def rounded(pictures_B3HW: Tensor) -> Tensor:
    """Eight bits a channel; the gradient passes unchanged."""
    made = (pictures_B3HW.detach().clamp(0, 1) * 255).round() / 255
    return pictures_B3HW + (made - pictures_B3HW).detach()


def jpeg(pictures_B3HW: Tensor, quality: int) -> Tensor:
    """As JPEG with 4:2:0 subsampling (Pillow's default); the gradient passes unchanged."""
    bytes_BHW3 = (pictures_B3HW.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    out = []
    for picture in bytes_BHW3:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        out.append(torch.from_numpy(np.asarray(Image.open(file)).copy()))
    made = torch.stack(out).permute(0, 3, 1, 2).to(pictures_B3HW) / 255
    return pictures_B3HW + (made - pictures_B3HW).detach()


def scaled(pictures_B3HW: Tensor, share: float) -> Tensor:
    """Sides times `share`, filtered as Pillow does."""
    size = [max(1, round(side * share)) for side in pictures_B3HW.shape[-2:]]
    return F.interpolate(pictures_B3HW, size, mode="bilinear", antialias=True, align_corners=False)


def cropped(pictures_B3HW: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the area is cut off, at a random place."""
    height, width = pictures_B3HW.shape[-2:]
    tall, wide = (max(1, round(side * (1 - share) ** 0.5)) for side in (height, width))
    top = int(torch.randint(height - tall + 1, (), generator=generator))
    left = int(torch.randint(width - wide + 1, (), generator=generator))
    return pictures_B3HW[..., top : top + tall, left : left + wide]


# What is measured: JPEG 80, half the size, a tenth cut off.
MEASURED: dict[str, Attack] = {
    "none": lambda x, g: rounded(x),
    "jpeg 80": lambda x, g: jpeg(x, 80),
    "half": lambda x, g: rounded(scaled(x, 0.5)),
    "crop a tenth": lambda x, g: rounded(cropped(x, 0.1, g)),
}


def random_attack(pictures_B3HW: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, tuple[int, int]]:
    """One of the kinds at a random strength, harder than what is measured.

    Returns:
        The pictures, scaled to `side` where they were made smaller; and by how many pixels a pattern is shifted.
    """
    kind = int(torch.randint(4, (), generator=generator))
    amount = float(torch.rand((), generator=generator))
    if kind == 0:
        return rounded(pictures_B3HW), (0, 0)
    if kind == 1:
        return jpeg(pictures_B3HW, int(70 + 20 * amount)), (0, 0)
    if kind == 2:
        small = rounded(scaled(pictures_B3HW, 0.45 + 0.4 * amount))
        return F.interpolate(small, (side, side), mode="bilinear", align_corners=False), (0, 0)
    down, right = (int(x) for x in torch.randint(9, (2,), generator=generator))
    return jpeg(pictures_B3HW[..., down:, right:], 90), (-down, -right)
