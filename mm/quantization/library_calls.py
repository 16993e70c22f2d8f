"""Methods of diffusers and transformers that would be wrong on a quantized model: made right, or made to raise."""

from __future__ import annotations

from typing import Any

from torch import nn

from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear


def set_calls(root: nn.Module) -> None:
    """Replaces methods of a model that was quantized, in its instance.

    `fuse_qkv_projections` would go back to 16 bits in silence: it raises. `num_parameters` counts integers too.
    """
    if hasattr(type(root), "fuse_qkv_projections"):
        root.__dict__["fuse_qkv_projections"] = _no_fusing
    if hasattr(type(root), "num_parameters"):
        root.__dict__["num_parameters"] = ParameterCount(root)


def reset_calls(root: nn.Module) -> None:
    """Undoes `set_calls`."""
    for name in ("fuse_qkv_projections", "num_parameters"):
        root.__dict__.pop(name, None)


def _no_fusing(*_args: Any, **_kwargs: Any) -> None:
    raise UserError(
        "fuse_qkv_projections would replace quantized layers by 16-bit ones; layers that read the same input share "
        "their rounding already"
    )


class ParameterCount:
    """`model.num_parameters` of a quantized model: its integers are buffers, which the libraries do not count."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Parameters of the 16-bit model; arguments as in diffusers and transformers. Integers are not trainable."""
        counted = type(self.model).num_parameters(self.model, only_trainable, exclude_embeddings)
        layers = [layer for layer in self.model.modules() if isinstance(layer, BranchedLinear) and layer.bits != 16]
        return counted if only_trainable else counted + sum(x.in_features * x.out_features for x in layers)
