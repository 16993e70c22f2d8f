"""The C++ backend: 4- or 8-bit storage, 8-bit products, branches fused; paths by instruction set, chosen when it loads.

Shapes: M tokens, N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches.

Design choices:
- The extension knows nothing of torch: it gets addresses, sizes and codes of element types. `ops` has checked shapes;
  here tensors are made contiguous and of a type that it reads.
- It is built without its own OpenMP library and takes the one that torch has loaded: two pools of threads would fight
  for the cores. Hence torch is imported first, and `threads` is torch's number.
- float16 x is read as it is and computed in fp32, as everything else is.
- 16-bit weights go to torch's own product (`dense`).
- A token's outputs have the same bits whatever tokens are computed beside it (kernels/cpu/product.h says how).
- Inputs that are not to be rounded are written as digits of 8 bits a group, each some 250 times finer than the last:
  two for 16-bit inputs and three for fp32, which errs less than these types do. Integer products of packed weights
  do the rest.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.kernels.dense import dense_linear
from mm.kernels.packing import GROUP, padded

_native: ModuleType | None
_absence: str | None = None
try:
    _native = import_module("mm.kernels.cpu._native")
except ImportError as error:
    _native = None
    _absence = f"the C++ extension does not load ({error}); reinstall where there is a C++17 compiler"

__all__ = [
    "absence",
    "dense_linear",
    "instruction_set",
    "lowbit_linear",
    "quantize_activations",
    "rounded_linear",
    "weight_only_linear",
]

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def absence() -> str | None:
    """Why this backend is not there; None where it is."""
    return _absence


def instruction_set() -> str | None:
    """The widest path that this CPU runs, capped by MM_KERNELS_ISA; None where the extension is absent.

    Raises:
        UserError: MM_KERNELS_ISA names no path.
    """
    if _native is None:
        return None
    try:
        return str(_native.choose(os.environ.get("MM_KERNELS_ISA", "")))
    except ValueError as error:
        raise UserError(str(error)) from None


if _native is not None:
    instruction_set()


def _ready(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, on the CPU, of a type that the extension reads."""
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise ValueError(f"the cpu backend reads tensors on the CPU, not on {tensor.device}")
    return (tensor if tensor.dtype in _CODES else tensor.float()).contiguous()


def _at(tensor: Tensor | None) -> tuple[int, int]:
    """Address and type code; (0, 0) for none."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), _CODES[tensor.dtype])


def _floats(tensor: Tensor | None) -> Tensor | None:
    """Contiguous fp32."""
    return None if tensor is None else tensor.float().contiguous()


def _bits(weight: Tensor) -> int:
    return 4 if weight.dtype == torch.uint8 else 8


def quantize_activations(
    x_MK: Tensor, smooth_K: Tensor | None, down_RK: Tensor | None, bits: int, group: int, unsigned: bool, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    assert _native is not None
    x, smooth, down = _ready(x_MK), _ready(smooth_K), _ready(down_RK)
    assert x is not None
    rows, columns = x.shape
    wide, rank = padded(columns), 0 if down is None else down.shape[0]
    values = torch.empty(rows, wide, dtype=torch.int8)
    scales = torch.empty(rows, wide // group if group else 1)
    low = torch.empty(rows, rank)
    _native.quantize(
        _at(x), _at(smooth), _at(down), (rows, columns, rank), bits, group, unsigned, shift,
        (values.data_ptr(), scales.data_ptr(), low.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    return values, scales, low


def lowbit_linear(
    values_MC: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales_NG: Tensor,
    bias_N: Tensor | None,
    low_MR: Tensor | None,
    up_NR: Tensor | None,
    branch_scales_R: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    assert _native is not None
    y_MN = torch.empty(len(values_MC), len(weight), dtype=dtype if dtype in _CODES else torch.float32)
    values, weight, scales = values_MC.contiguous(), weight.contiguous(), scales.float().contiguous()
    weight_scales, bias, up = _ready(weight_scales_NG), _ready(bias_N), _ready(up_NR)
    low, branch_scales = _floats(low_MR), _floats(branch_scales_R)
    (rows, wide), outputs = values.shape, weight.shape[0]
    _native.linear(
        (values.data_ptr(), scales.data_ptr(), weight.data_ptr()), _at(weight_scales), _at(bias), _at(low), _at(up),
        _at(branch_scales), _at(y_MN), (rows, outputs, wide, scales.shape[1], 0 if up is None else up.shape[1]),
        _bits(weight), torch.get_num_threads(),
    )  # fmt: skip
    return y_MN.to(dtype)


def rounded_linear(
    x_MK: Tensor,
    weight: Tensor,
    weight_scales_NG: Tensor,
    bias_N: Tensor | None,
    smooth_K: Tensor | None,
    down_RK: Tensor | None,
    up_NR: Tensor | None,
    branch_scales_R: Tensor | None,
    rounding: tuple[int, int, bool, float],
) -> Tensor:
    """(M, N) in x's dtype; `rounding` holds bits, group, unsigned and shift of the inputs."""
    assert _native is not None
    x, weight = _ready(x_MK), weight.contiguous()
    assert x is not None
    (rows, columns), outputs, rank = x.shape, weight.shape[0], 0 if down_RK is None else down_RK.shape[0]
    y_MN = torch.empty(rows, outputs, dtype=x.dtype)
    # Named, since the extension reads what they point at
    smooth, down, weight_scales, bias = _ready(smooth_K), _ready(down_RK), _ready(weight_scales_NG), _ready(bias_N)
    up, branch_scales = _ready(up_NR), _floats(branch_scales_R)
    _native.layer(
        _at(x), _at(smooth), _at(down), weight.data_ptr(), _at(weight_scales), _at(bias), _at(up),
        _at(branch_scales)[0], _at(y_MN), (rows, outputs, columns, rank), _bits(weight), rounding,
        torch.get_num_threads(),
    )  # fmt: skip
    return y_MN if x.dtype == x_MK.dtype else y_MN.to(x_MK.dtype)


def weight_only_linear(
    x_MK: Tensor,
    weight: Tensor,
    weight_scales_NG: Tensor,
    bias_N: Tensor | None,
    smooth_K: Tensor | None,
    down_RK: Tensor | None,
    up_NR: Tensor | None,
    branch_scales_R: Tensor | None,
    shift: float,
) -> Tensor:
    """(M, N) in x's dtype; x is read as a sum of digits, each rounded to 8 bits a group.

    All digits are tokens of one product, so that weights are read once; the branch belongs to the first.
    """
    (rows, columns), wide = x_MK.shape, padded(x_MK.shape[1])
    left = x_MK.float() + shift
    left = left if smooth_K is None else left * (1 / smooth_K.float())
    count = 3 if x_MK.dtype in (torch.float32, torch.float64) else 2
    digits, steps = [], []
    for number in range(count):
        digit, step, _ = quantize_activations(left, None, None, 8, GROUP, False, 0.0)
        digits.append(digit)
        steps.append(step)
        if number + 1 < count:
            read = (digit.view(rows, wide // GROUP, GROUP) * step[..., None]).view(rows, wide)
            left = left - read[:, :columns]
    low = None
    if down_RK is not None:
        low = x_MK.new_zeros(count * rows, down_RK.shape[0], dtype=torch.float32)
        low[:rows] = quantize_activations(x_MK, None, down_RK, 8, 0, False, 0.0)[2]
    parts = lowbit_linear(
        torch.cat(digits), torch.cat(steps), weight, weight_scales_NG, None, low, up_NR, branch_scales_R, torch.float32
    ).view(count, rows, len(weight))
    y_MN = parts[0]
    for part in parts[1:]:
        y_MN += part
    return (y_MN if bias_N is None else y_MN + bias_N).to(x_MK.dtype)
