"""Measures of how close two pictures are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_PSNR = 100.0  # dB; of equal pictures it would be infinite


def psnr(pictures_BCHW: torch.Tensor, references_BCHW: torch.Tensor, *, data_range: float) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture by torchmetrics, in dB, at most `MAX_PSNR`.

    Args:
        pictures_BCHW: Pictures in floating point.
        references_BCHW: What they are compared with.
        data_range: The range of values, such as 255 or 2.

    Returns:
        One value a picture (B,).
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values = peak_signal_noise_ratio(
        pictures_BCHW, references_BCHW, data_range=data_range, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp_max(MAX_PSNR)
