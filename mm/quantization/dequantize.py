"""Quantized models as 16-bit ones again."""

from __future__ import annotations

import torch
from torch import nn

from mm.core.errors import UserError
from mm.quantization.layout import quantized
from mm.quantization.library_calls import reset_calls


def dequantize(root: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Gives every quantized layer the 16-bit weight that its integers and its SVD branch stand for, in place.

    What rounding took away stays away. Inputs are no longer rounded.

    Args:
        root: a quantized model.
        dtype: of the weights; by default that of each layer's scales.

    Returns:
        The same model.

    Raises:
        UserError: where adapters lie on a layer; nothing is changed then.
    """
    layers = quantized(root)
    for path, layer in layers:
        if layer.branches:
            raise UserError(f"{path} carries adapter {layer.branches[0].name!r}; take adapters off, then dequantize")
    for _, layer in layers:
        layer.dequantize_(dtype)
        layer.to_linear()
    root.__dict__.pop("mm_base_hash", None)  # these are other tensors than those that were quantized
    reset_calls(root)
    return root
