"""The ops of linear layers as torch custom ops: `mm::quantize_activations`, `mm::lowbit_linear`, `mm::branched_linear`.

Shapes: M tokens, N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches.

Design choices:
- Each op checks its arguments (`checks`) before any backend runs, in the real and in the fake version.
- Fake versions give shapes only, so torch.compile sees one node per layer, and scales of branches are data.
- `branched_linear` is the whole sum of one layer. Layers of one input group call `quantize_activations` once and
  `lowbit_linear` each, with their share of `low`.
- Forward only: training a branch on a frozen layer goes through plain torch.
- Which backend runs is `dispatch`'s choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels import checks
from mm.kernels.dispatch import implementation
from mm.kernels.packing import padded

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
    checks.activations(x, smooth, down, bits, group, unsigned)
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
    checks.activations(x, smooth, down, bits, group, unsigned)
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
    checks.lowbit(values, scales, weight, weight_scales, bias, low, up, branch_scales, dtype)
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
    checks.lowbit(values, scales, weight, weight_scales, bias, low, up, branch_scales, dtype)
    return values.new_empty(values.shape[0], weight.shape[0], dtype=dtype)


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

    It is the op `mm::branched_linear`. Where nothing watches (no compiler, tracer, fake tensor or gradient), the op's
    function is called without torch's dispatcher, which takes longer than a small layer.

    Args:
        x: floating point (..., K).
        weight: uint8 (N, C / 2), int8 (N, C), or floating point (N, K).
        weight_scales: (N, G) of a 4- or 8-bit weight.
        bias: (N,).
        smooth: (K,), what x + shift is divided by.
        down: (R, K).
        up: (N, R).
        branch_scales: (R,).
        bits: of the rounded inputs: 4, 8, or 16 for inputs that are not rounded.
        group: 0 for one scale per token, 64 for one per group.
        unsigned: 4-bit inputs from 0 to 15.
        shift: added to x before it is rounded.

    Returns:
        (..., N) in x's dtype.

    Raises:
        UserError: shapes, types or devices do not fit.
    """
    arguments = (x, weight, weight_scales, bias, smooth, down, up, branch_scales, bits, group, unsigned, shift)
    if _watched(x, weight, weight_scales, bias, smooth, down, up, branch_scales):
        return torch.ops.mm.branched_linear(*arguments)
    return _branched_linear(*arguments)


def _watched(x: Tensor, *others: Tensor | None) -> bool:
    """Whether something other than a backend has to see the op."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._get_tracing_state() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))


def _branched_linear(
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
    checks.branched(x, weight, weight_scales, bias, smooth, down, up, branch_scales, bits, group, unsigned)
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if weight_scales is None:
        y = implementation("dense_linear", x)(flat, weight, bias, down, up, branch_scales)
    elif bits == 16:
        run = implementation("weight_only_linear", x)
        y = run(flat, weight, weight_scales, bias, smooth, down, up, branch_scales, shift)
    else:
        run = implementation("rounded_linear", x)
        rounding = (bits, group, unsigned, shift)
        y = run(flat, weight, weight_scales, bias, smooth, down, up, branch_scales, rounding)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


_branched_op = torch.library.custom_op(
    "mm::branched_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? weight_scales=None, Tensor? bias=None, Tensor? smooth=None, "
    "Tensor? down=None, Tensor? up=None, Tensor? branch_scales=None, int bits=8, int group=0, bool unsigned=False, "
    "float shift=0.0) -> Tensor",
)(_branched_linear)


@_branched_op.register_fake
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
    checks.branched(x, weight, weight_scales, bias, smooth, down, up, branch_scales, bits, group, unsigned)
    return x.new_empty(*x.shape[:-1], weight.shape[0])
