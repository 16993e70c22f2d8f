"""Latents of tiny pipelines as a grid, whatever their pipeline packs them to."""

from __future__ import annotations

from tiny_pipelines import SIDE
from torch import Tensor

from mm.customization.objectives.transformers import unpacked


def grid_of(name: str, latents: Tensor, side: int = SIDE) -> Tensor:
    """Latents (B, C, H, W) of what a pipeline samples.

    Args:
        name: of the pipeline.
        latents: as its scheduler gets them.
        side: of the picture.
    """
    if latents.ndim == 4:
        return latents.float()
    if latents.ndim == 5:  # a video of one frame
        return latents[:, :, 0].float()
    if name.startswith("flux-2"):  # rows of patches, whose channels lie as in the grid
        return latents.float().transpose(1, 2).unflatten(2, (side // 8, side // 8))
    cells = side // (2 if name.startswith("qwen-image") else 4)
    return unpacked(latents.float(), cells, cells)  # 2 x 2 patches
