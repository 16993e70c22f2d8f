"""The hash of a model's 16-bit tensors, by which a patch recognizes the model it was made for."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def base_hash(root: nn.Module) -> str:
    """Of a model's 16-bit tensors: what it was quantized from, or its own where it is not quantized."""
    kept = getattr(root, "mm_base_hash", None)
    if kept:
        return str(kept)
    digest = hashlib.sha256()
    for name, tensor in sorted(root.state_dict().items()):
        digest.update(name.encode())
        digest.update(str(tuple(tensor.shape)).encode())
        values = tensor.detach().to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.detach().cpu()
        digest.update(values.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
