"""Which pictures of a call are drawn together: all, or with rounded activations each alone.

The last bits of 16-bit layers depend on the number of rows, since torch chooses other kernels for other sizes. Where a
layer rounds its inputs to 8 or 4 bits, such a difference now and then moves a value into the next step, and the
pictures drift apart: by up to 175 of 255 between batch sizes. A picture that is drawn alone has the same bits in any
call, so 4-bit models draw one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mm.layers.linear import BranchedLinear


def rounds_activations(pipe: Any) -> bool:
    """Whether a module of the pipeline has layers that round their inputs."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return any(
        isinstance(layer, BranchedLinear) and layer.bits != 16 and layer.activation.bits != 16
        for module in modules
        for layer in module.modules()
    )


def parts_of(pipe: Any, pictures: int) -> list[slice]:
    """The pictures of a call in parts that are drawn together."""
    if pictures > 1 and rounds_activations(pipe):
        return [slice(k, k + 1) for k in range(pictures)]
    return [slice(0, pictures)]


def joined(parts: Sequence[Any]) -> Any:
    """Pictures of several parts as those of one: lists, arrays (B, H, W, 3) or tensors (B, ...)."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts))
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(list(parts))
    return [picture for part in parts for picture in part]
