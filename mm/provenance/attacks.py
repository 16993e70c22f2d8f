"""What happens to pictures on their way: JPEG, scaling, cropping. For training and for measuring fingerprints.

Design choices
- Fingerprints are measured with Pillow's own JPEG. Training runs on any device, and so has a JPEG of tensor operations
  (`jpeg_like`), whose rounding of coefficients lets the gradient pass unchanged (Shin and Song 2017, "JPEG-resistant
  adversarial images"; Zhu et al. 2018, HiDDeN, arXiv 1807.09937).

Legend: B pictures, H x W pixels, N blocks of 8 x 8; all pictures are in [0, 1].
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Attack = Callable[[Tensor, torch.Generator], Tensor]

# Of JFIF: luma, blue and red difference of red, green, blue.
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
# fmt: off
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *[99] * 32,
)
# fmt: on


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


def jpeg_like(pictures_B3HW: Tensor, quality_B: Tensor) -> Tensor:
    """As `jpeg`, in tensor operations on any device, with a quality of its own for each picture.

    Args:
        pictures_B3HW: in [0, 1].
        quality_B: 1 to 100.

    Returns:
        The decoded pictures; gradients pass the rounding of coefficients unchanged. Entropy coding loses nothing and
        is left out. ITU-T T.81, with the tables of its annex K scaled as libjpeg does.
    """
    height, width = pictures_B3HW.shape[-2:]
    padded = F.pad(rounded(pictures_B3HW), (0, -width % 16, 0, -height % 16), mode="replicate") * 255
    matrix = padded.new_tensor(_TO_YCBCR)
    channels = torch.einsum("ij,bjhw->bihw", matrix, padded)
    scale_B = torch.where(quality_B < 50, 5000 / quality_B, 200 - 2 * quality_B).to(padded)
    luma = _coded(channels[:, :1] - 128, _table(_LUMA, scale_B))
    chroma = _coded(F.avg_pool2d(channels[:, 1:], 2), _table(_CHROMA, scale_B))
    chroma = F.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False)
    made = torch.cat([luma + 128, chroma], 1)
    back = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix.double().cpu()).to(matrix), made) / 255
    return rounded(back[..., :height, :width])


def _coded(planes_BCHW: Tensor, table_B88: Tensor) -> Tensor:
    """Planes after their 8 x 8 cosine transform, rounded to multiples of the table's entries, and back."""
    basis = _cosines(planes_BCHW)
    blocks_BCNM88 = planes_BCHW.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    coefficients = basis @ blocks_BCNM88 @ basis.T
    steps = table_B88[:, None, None, None]
    ratio = coefficients / steps
    coefficients = (ratio + (ratio.round() - ratio).detach()) * steps
    return (basis.T @ coefficients @ basis).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _cosines(like: Tensor) -> Tensor:
    """The orthonormal cosine transform of 8 values (type II), as a matrix."""
    k = torch.arange(8, device=like.device, dtype=like.dtype)
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) / 2
    return torch.cat([basis[:1] * 0.5**0.5, basis[1:]])


def _table(base: Sequence[int], scale_B: Tensor) -> Tensor:
    table_88 = scale_B.new_tensor(base).view(8, 8)
    return ((table_88 * scale_B.view(-1, 1, 1) + 50) / 100).floor().clamp(1, 255)


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


def random_attacks(
    pictures_B3HW: Tensor, side: int, generator: torch.Generator, strength: float = 1.0
) -> list[tuple[Tensor, tuple[int, int]]]:  # fmt: skip
    """None and each kind for a quarter of the pictures, at random strengths, the most of them above what is measured.

    Args:
        pictures_B3HW: on any device.
        side: to which pictures that were made smaller are scaled.
        generator: on the CPU, so that no device waits for it.
        strength: above 0, at most 1, of the strongest.

    Returns:
        The parts, in order, in eight bits a channel; each with the pixels by which a pattern is shifted down and right.
    """
    plain, coded, small, cut = pictures_B3HW.tensor_split(4)
    quality = 95 - 30 * strength * torch.rand(len(coded), generator=generator)
    share = 1 - 0.6 * strength * float(torch.rand((), generator=generator))
    top, bottom, left, right = (int(x) for x in torch.randint(1 + round(16 * strength), (4,), generator=generator))
    height, width = cut.shape[-2:]
    found = [
        (rounded(plain), (0, 0)), (jpeg_like(coded, quality.to(coded.device, non_blocking=True)), (0, 0)),
        (at_side(rounded(scaled(small, share)), side), (0, 0)),
        (rounded(cut[..., top : height - bottom, left : width - right]), (-top, -left)),
    ]  # fmt: skip
    return [(part, shift) for part, shift in found if len(part)]


def at_side(pictures_B3HW: Tensor, side: int) -> Tensor:
    """Pictures scaled to a side."""
    if pictures_B3HW.shape[-2:] == (side, side):
        return pictures_B3HW
    return F.interpolate(pictures_B3HW, (side, side), mode="bilinear", align_corners=False)
