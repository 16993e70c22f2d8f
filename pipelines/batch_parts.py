"""Which pictures of a call are drawn together: all, or with rounded activations each alone (`mm.engine.batching`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mm.engine.batching import rounds_activations


def parts_of(pipe: Any, pictures: int, *, singly: bool = False) -> list[slice]:
    """The pictures of a call in parts that are drawn together; `singly`: each alone in any case."""
    if pictures > 1 and (singly or rounds_activations(pipe)):
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
