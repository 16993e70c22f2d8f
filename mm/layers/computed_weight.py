"""The weight of a quantized layer as a tensor that can be read and not written.

Design choices
- Other libraries merge adapters by writing to `layer.weight.data`. A quantized layer computes its weight, so such a
  write would change a copy and do nothing. It raises instead.
- Every operation gives ordinary tensors.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from mm.core.errors import UserError

_WRITES = (
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"),
    *("add_", "sub_", "mul_", "div_", "copy_", "set_", "zero_", "fill_", "addmm_", "lerp_", "normal_", "uniform_"),
)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(
        "this layer has quantized weights, which take no merging or writing; keep the adapter beside them, or "
        "merge it into the 16-bit model and quantize that"
    )


class ComputedWeight(Tensor):
    """What a quantized layer's `.weight` gives."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _is_hf_initialized = True  # transformers fills weights that were not in a checkpoint, unless they say this

    @property
    def data(self) -> Tensor:
        """The same values, as little writable as this."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse()


for _name in _WRITES:
    setattr(ComputedWeight, _name, _refuse)


def computed(weight: Tensor) -> Tensor:
    """`weight`, not to be written to; as it is inside `torch.compile`, which traces no writes of other libraries."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(ComputedWeight)
