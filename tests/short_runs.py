"""Runs of customization that take a second: their settings, and the weights of a pipeline to compare."""

from __future__ import annotations

from typing import Any

import torch
from tiny_pipelines import SIDE

FAST: dict[str, Any] = {
    "steps": 12, "batch_size": 2, "size": SIDE, "preview_every": 6, "preserve_batch": 2, "learning_rate": 2e-2,
    "preserved": (), "rank": 4,
}  # fmt: skip


def state_of(pipe: Any) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a pipeline's modules."""
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in module.state_dict().items()
    }
