"""What the ops refuse: shapes, types and devices, checked before a kernel runs; kernels trust them.

Shapes: M tokens, N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches.

Messages are built only where a check fails: a whole layer of 256 x 256 takes some ten microseconds. Every function here
raises `UserError`, a ValueError, with the value that does not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.kernels.packing import GROUP, padded

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
RANK_STEP = 16


def one_device(x: Tensor, **others: Tensor | None) -> None:
    """Every tensor of an op lies where its input lies.

    The fake version of an op runs as soon as one tensor is on `meta`. It returns memory that nothing has written, so a
    layer with a tensor that was never loaded would go unnoticed.

    Args:
        x: the op's input.
        **others: its other tensors by name; None where the caller gave none.
    """
    device = x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise UserError(_apart(name, tensor.device, device))


def _apart(name: str, device: torch.device, wanted: torch.device) -> str:
    if device.type == "meta":
        return f"{name} lies on meta, so it was never loaded, and the input lies on {wanted}: load the layer's tensors"
    return f"{name} lies on {device} and the input on {wanted}: move the model and its input to one device"


def activations(x: Tensor, smooth: Tensor | None, down: Tensor | None, bits: int, group: int, unsigned: bool) -> None:
    """The arguments of `quantize_activations`."""
    _rounding(bits, group, unsigned)
    if x.ndim != 2 or x.shape[1] == 0:
        raise UserError(f"x must be a matrix (M, K) with K > 0, not {tuple(x.shape)}")
    _floating("x", x)
    one_device(x, smooth=smooth, down=down)
    _vector("smooth", smooth, x.shape[1])
    if down is not None:
        if down.ndim != 2 or down.shape[1] != x.shape[1]:
            raise UserError(f"down {tuple(down.shape)} does not read x {tuple(x.shape)}")
        _rank(down.shape[0])


def lowbit(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    branch_scales: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """The arguments of `lowbit_linear`."""
    if values.ndim != 2 or values.dtype != torch.int8 or values.shape[1] % GROUP or not values.shape[1]:
        raise UserError(f"values must be int8 (M, a multiple of {GROUP}), not {tuple(values.shape)} {values.dtype}")
    rows, wide = values.shape
    if tuple(scales.shape) not in ((rows, 1), (rows, wide // GROUP)):
        raise UserError(f"scales must have shape ({rows}, 1) or ({rows}, {wide // GROUP}), not {tuple(scales.shape)}")
    if dtype not in FLOATS:
        raise UserError(f"dtype must be floating point, not {dtype}")
    one_device(
        values, scales=scales, weight=weight, weight_scales=weight_scales, bias=bias, low=low, up=up,
        branch_scales=branch_scales,
    )  # fmt: skip
    _weight(weight, weight_scales, wide)
    if low is not None and (low.ndim != 2 or low.shape[0] != rows):
        raise UserError(f"low must have {rows} rows, not shape {tuple(low.shape)}")
    _outputs(weight.shape[0], bias, up, None if low is None else low.shape[1], branch_scales)


def branched(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor | None,
    bias: Tensor | None,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    branch_scales: Tensor | None,
    bits: int,
    group: int,
    unsigned: bool,
) -> None:
    """The arguments of `branched_linear`."""
    if bits != 16:
        _rounding(bits, group, unsigned)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise UserError(f"x must have inputs in its last dimension, not shape {tuple(x.shape)}")
    _floating("x", x)
    one_device(
        x, weight=weight, weight_scales=weight_scales, bias=bias, smooth=smooth, down=down, up=up,
        branch_scales=branch_scales,
    )  # fmt: skip
    inputs = x.shape[-1]
    _vector("smooth", smooth, inputs)
    if weight_scales is not None:
        _weight(weight, weight_scales, padded(inputs))
    elif weight.dtype not in FLOATS:
        raise UserError(f"a weight without scales is floating point, not {weight.dtype}")
    elif weight.ndim != 2 or weight.shape[1] != inputs:
        raise UserError(f"weight must have shape (N, {inputs}), not {tuple(weight.shape)}")
    if down is not None and (down.ndim != 2 or down.shape[1] != inputs):
        raise UserError(f"down must have shape (R, {inputs}), not {tuple(down.shape)}")
    _outputs(weight.shape[0], bias, up, None if down is None else down.shape[0], branch_scales)


def _floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise UserError(f"{name} must be floating point, not {tensor.dtype}")


def _vector(name: str, tensor: Tensor | None, length: int) -> None:
    if tensor is not None and (tensor.ndim != 1 or tensor.shape[0] != length):
        raise UserError(f"{name} must have shape ({length},), not {tuple(tensor.shape)}")


def _rounding(bits: int, group: int, unsigned: bool) -> None:
    if bits not in (4, 8):
        raise UserError(f"activations take 4 or 8 bits, not {bits}")
    if group not in (0, GROUP):
        raise UserError(f"scales of activations are per token (0) or per group of {GROUP}, not {group}")
    if unsigned and bits != 4:
        raise UserError(f"unsigned activations take 4 bits, not {bits}")


def _rank(rank: int) -> None:
    if rank % RANK_STEP:
        raise UserError(f"the rank of all branches must be padded to a multiple of {RANK_STEP}, not {rank}")


def _outputs(
    outputs: int, bias: Tensor | None, up: Tensor | None, rank: int | None, branch_scales: Tensor | None
) -> None:
    _vector("bias", bias, outputs)
    if (up is None) != (rank is None):
        raise UserError("a branch needs both down (or low) and up")
    if up is not None and rank is not None:
        _rank(rank)
        if up.ndim != 2 or up.shape[0] != outputs or up.shape[1] != rank:
            raise UserError(f"up must have shape ({outputs}, {rank}), not {tuple(up.shape)}")
    if branch_scales is not None:
        if rank is None:
            raise UserError("branch_scales without a branch")
        _vector("branch_scales", branch_scales, rank)


def _weight(weight: Tensor, weight_scales: Tensor, wide: int) -> None:
    if weight.dtype not in (torch.uint8, torch.int8):
        raise UserError(f"packed 4-bit weights are uint8 and 8-bit weights int8, not {weight.dtype}")
    columns = wide // 2 if weight.dtype == torch.uint8 else wide
    if weight.ndim != 2 or weight.shape[1] != columns:
        raise UserError(f"{weight.dtype} weights must have shape (N, {columns}), not {tuple(weight.shape)}")
    want = (weight.shape[0], wide // GROUP)
    if weight_scales.shape != want:
        raise UserError(f"weight_scales must have shape {want}, not {tuple(weight_scales.shape)}")
