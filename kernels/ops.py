"""The ops of linear layers as torch custom ops: `mm::quantize_activations`, `mm::lowbit_linear`, `mm::branched_linear`.

Shapes: M tokens, N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches.

Design choices:
- Each op checks its shapes before any backend runs, in the real and in the fake version alike: kernels trust them.
- Fake versions give shapes only, so torch.compile sees one node per layer, and scales of branches are data.
- `branched_linear` is the whole sum of one layer. Layers of one input group call `quantize_activations` once and
  `lowbit_linear` each, with their share of `low`.
- Forward only: training a branch on a frozen layer goes through plain torch.

It does not know which backend runs (`dispatch`), nor where weights come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels.dispatch import implementation
from mm.kernels.packing import GROUP, padded

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_RANK_STEP = 16
_Ready = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op(
    "mm::quantize_activations",
    mutates_args=(),
    schema="(Tensor x, Tensor? smooth=None, Tensor? down=None, int bits=8, int group=0, bool unsigned=False, "
    "float shift=0.0) -> (Tensor, Tensor, Tensor)",
)
def quantize_activations(
    x: Tensor,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    bits: int = 8,
    group: int = 0,
    unsigned: bool = False,
    shift: float = 0.0,
) -> _Ready:
    """x (M, K) to int8 values (M, C), scales (M, 1) or by group (M, G), and low = x down^T (M, R), in one pass.

    `group` is 0 (one scale per token) or 64. Signed steps reach 127 (8 bits) or 7 (4 bits) at the largest magnitude;
    `unsigned` takes 4 bits only and reaches 15, after `shift` has lifted x above zero. x + shift is divided by
    `smooth`; `down` reads the raw x and has 1 / smooth folded in. Scales and low are fp32 (float64 for a float64 x).
    """
    _check_activations(x, smooth, down, bits, group, unsigned)
    run = implementation("quantize_activations", x)
    return run(x, smooth, down, bits, group, unsigned, shift)


@quantize_activations.register_fake
def _(
    x: Tensor,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    bits: int = 8,
    group: int = 0,
    unsigned: bool = False,
    shift: float = 0.0,
) -> _Ready:
    _check_activations(x, smooth, down, bits, group, unsigned)
    rows, wide = x.shape[0], padded(x.shape[1])
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(rows, wide, dtype=torch.int8),
        x.new_empty(rows, wide // group if group else 1, dtype=work),
        x.new_empty(rows, 0 if down is None else down.shape[0], dtype=work),
    )


@torch.library.custom_op(
    "mm::lowbit_linear",
    mutates_args=(),
    schema="(Tensor values, Tensor scales, Tensor weight, Tensor weight_scales, Tensor? bias=None, Tensor? low=None, "
    "Tensor? up=None, Tensor? branch_scales=None, ScalarType dtype=bfloat16) -> Tensor",
)
def lowbit_linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    branch_scales: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(M, N) in `dtype`: quantized activations times 4- or 8-bit weights, + bias + (low * branch_scales) up^T.

    weight is uint8 (N, C / 2) as `pack_int4` makes it, or int8 (N, C), padding zero; weight_scales (N, G), up (N, R).
    """
    _check_lowbit(values, scales, weight, weight_scales, bias, low, up, branch_scales, dtype)
    run = implementation("lowbit_linear", scales)
    return run(values, scales, weight, weight_scales, bias, low, up, branch_scales, dtype)


@lowbit_linear.register_fake
def _(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    branch_scales: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    _check_lowbit(values, scales, weight, weight_scales, bias, low, up, branch_scales, dtype)
    return values.new_empty(values.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op(
    "mm::branched_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? weight_scales=None, Tensor? bias=None, Tensor? smooth=None, "
    "Tensor? down=None, Tensor? up=None, Tensor? branch_scales=None, int bits=8, int group=0, bool unsigned=False, "
    "float shift=0.0) -> Tensor",
)
def branched_linear(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor | None = None,
    bias: Tensor | None = None,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    branch_scales: Tensor | None = None,
    bits: int = 8,
    group: int = 0,
    unsigned: bool = False,
    shift: float = 0.0,
) -> Tensor:
    """y (..., N) = x W^T + bias + (x down^T * branch_scales) up^T for x (..., K), in x's dtype.

    A weight with scales is 4- or 8-bit, as `lowbit_linear` takes it, and x is quantized as `quantize_activations` says,
    or not at all with `bits` 16. Without scales it is (N, K) in floating point, and smooth, bits, group, unsigned and
    shift do not apply. All branches lie side by side in down (R, K) and up (N, R), R a multiple of 16.
    """
    _check_branched(x, weight, weight_scales, bias, smooth, down, up, branch_scales, bits, group, unsigned)
    flat = x.reshape(-1, x.shape[-1])
    if weight_scales is None:
        y = implementation("dense_linear", x)(flat, weight, bias, down, up, branch_scales)
    elif bits == 16:
        run = implementation("weight_only_linear", x)
        y = run(flat, weight, weight_scales, bias, smooth, down, up, branch_scales, shift)
    else:
        run = implementation("rounded_linear", x)
        rounding = (bits, group, unsigned, shift)
        y = run(flat, weight, weight_scales, bias, smooth, down, up, branch_scales, rounding)
    return y.view(*x.shape[:-1], weight.shape[0])


@branched_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor | None = None,
    bias: Tensor | None = None,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    branch_scales: Tensor | None = None,
    bits: int = 8,
    group: int = 0,
    unsigned: bool = False,
    shift: float = 0.0,
) -> Tensor:
    _check_branched(x, weight, weight_scales, bias, smooth, down, up, branch_scales, bits, group, unsigned)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(what)


def _check_vector(name: str, tensor: Tensor | None, length: int) -> None:
    if tensor is not None:
        _need(tuple(tensor.shape) == (length,), f"{name} must have shape ({length},), not {tuple(tensor.shape)}")


def _check_rounding(bits: int, group: int, unsigned: bool) -> None:
    _need(bits in (4, 8), f"activations take 4 or 8 bits, not {bits}")
    _need(group in (0, GROUP), f"scales of activations are per token (0) or per group of {GROUP}, not {group}")
    _need(not unsigned or bits == 4, f"unsigned activations take 4 bits, not {bits}")


def _check_activations(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, bits: int, group: int, unsigned: bool
) -> None:
    _check_rounding(bits, group, unsigned)
    _need(x.ndim == 2 and x.shape[1] > 0, f"x must be a matrix (M, K) with K > 0, not {tuple(x.shape)}")
    _need(x.dtype in _FLOATS, f"x must be floating point, not {x.dtype}")
    _check_vector("smooth", smooth, x.shape[1])
    if down is not None:
        _need(
            down.ndim == 2 and down.shape[1] == x.shape[1], f"down {tuple(down.shape)} does not read x {tuple(x.shape)}"
        )
        _check_rank(down.shape[0])


def _check_rank(rank: int) -> None:
    _need(rank % _RANK_STEP == 0, f"the rank of all branches must be padded to a multiple of {_RANK_STEP}, not {rank}")


def _check_outputs(
    outputs: int, bias: Tensor | None, up: Tensor | None, rank: int | None, branch_scales: Tensor | None
) -> None:
    _check_vector("bias", bias, outputs)
    _need((up is None) == (rank is None), "a branch needs both down (or low) and up")
    if up is not None and rank is not None:
        _check_rank(rank)
        _need(tuple(up.shape) == (outputs, rank), f"up must have shape ({outputs}, {rank}), not {tuple(up.shape)}")
    if branch_scales is not None:
        _need(rank is not None, "branch_scales without a branch")
        _check_vector("branch_scales", branch_scales, rank or 0)


def _check_weight(weight: Tensor, weight_scales: Tensor, wide: int) -> None:
    _need(
        weight.dtype in (torch.uint8, torch.int8),
        f"packed 4-bit weights are uint8 and 8-bit weights int8, not {weight.dtype}",
    )
    columns = wide // 2 if weight.dtype == torch.uint8 else wide
    _need(
        weight.ndim == 2 and weight.shape[1] == columns,
        f"{weight.dtype} weights must have shape (N, {columns}), not {tuple(weight.shape)}",
    )
    want = (weight.shape[0], wide // GROUP)
    _need(tuple(weight_scales.shape) == want, f"weight_scales must have shape {want}, not {tuple(weight_scales.shape)}")


def _check_lowbit(
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
    _need(
        values.ndim == 2 and values.dtype == torch.int8 and values.shape[1] % GROUP == 0,
        f"values must be int8 (M, a multiple of {GROUP}), not {tuple(values.shape)} {values.dtype}",
    )
    rows, wide = values.shape
    _need(
        tuple(scales.shape) in ((rows, 1), (rows, wide // GROUP)),
        f"scales must have shape ({rows}, 1) or ({rows}, {wide // GROUP}), not {tuple(scales.shape)}",
    )
    _need(dtype in _FLOATS, f"dtype must be floating point, not {dtype}")
    _check_weight(weight, weight_scales, wide)
    if low is not None:
        _need(low.ndim == 2 and low.shape[0] == rows, f"low must have {rows} rows, not shape {tuple(low.shape)}")
    _check_outputs(weight.shape[0], bias, up, None if low is None else low.shape[1], branch_scales)


def _check_branched(
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
    if bits != 16:
        _check_rounding(bits, group, unsigned)
    _need(x.ndim >= 1 and x.shape[-1] > 0, f"x must have inputs in its last dimension, not shape {tuple(x.shape)}")
    _need(x.dtype in _FLOATS, f"x must be floating point, not {x.dtype}")
    inputs = x.shape[-1]
    _check_vector("smooth", smooth, inputs)
    if weight_scales is None:
        _need(weight.dtype in _FLOATS, f"a weight without scales is floating point, not {weight.dtype}")
        _need(
            weight.ndim == 2 and weight.shape[1] == inputs,
            f"weight must have shape (N, {inputs}), not {tuple(weight.shape)}",
        )
    else:
        _check_weight(weight, weight_scales, padded(inputs))
    if down is not None:
        _need(
            down.ndim == 2 and down.shape[1] == inputs, f"down must have shape (R, {inputs}), not {tuple(down.shape)}"
        )
    _check_outputs(weight.shape[0], bias, up, None if down is None else down.shape[0], branch_scales)
