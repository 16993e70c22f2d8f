"""The C++ backend: 4- or 8-bit storage, 8-bit products, branches fused; AVX512-VNNI, AVX2 and portable paths.

Shapes: M tokens, N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches.

Design choices:
- The extension knows nothing of torch: it gets addresses, sizes and codes of element types. `ops` has checked shapes;
  here tensors are made contiguous and of a type that it reads.
- It is built without its own OpenMP library and takes the one that torch has loaded: two pools of threads would fight
  for the cores. Hence torch is imported first, and `threads` is torch's number.
- float16 x is read as it is and computed in fp32, as everything else is.
- 16-bit weights go to torch's own product (`dense`).
- Many tokens are rounded and multiplied a stretch at a time: rounded inputs then stay in the last-level cache, where
  all of FLUX's 4096 tokens of 12288 numbers would be written out to fresh memory and fetched back.
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
from mm.kernels.dense import add_branch, dense_linear
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
_STRETCH = 1024  # tokens: about as many as the product (many512.h) takes at once anyway
_TILE = 6  # tokens of one of its tiles


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
    if tensor.device.type != "cpu":
        raise ValueError(f"the cpu backend reads tensors on the CPU, not on {tensor.device}")
    return (tensor if tensor.dtype in _CODES else tensor.float()).contiguous()


def _at(tensor: Tensor | None) -> tuple[int, int]:
    """Address and type code; (0, 0) for none."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), _CODES[tensor.dtype])


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
    y = torch.empty(len(values_MC), len(weight), dtype=dtype if dtype in _CODES else torch.float32)
    _lowbit_into(y, values_MC, scales, weight, weight_scales_NG, bias_N, low_MR, up_NR, branch_scales_R)
    return y.to(dtype)


def _lowbit_into(
    y_MN: Tensor,
    values_MC: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales_NG: Tensor,
    bias_N: Tensor | None,
    low_MR: Tensor | None,
    up_NR: Tensor | None,
    branch_scales_R: Tensor | None,
) -> None:
    assert _native is not None
    values, weight, scales = values_MC.contiguous(), weight.contiguous(), scales.float().contiguous()
    weight_scales, bias, up = _ready(weight_scales_NG), _ready(bias_N), _ready(up_NR)
    low = None if low_MR is None else low_MR.float().contiguous()
    branch_scales = None if branch_scales_R is None else branch_scales_R.float().contiguous()
    (rows, wide), outputs = values.shape, weight.shape[0]
    _native.linear(
        (values.data_ptr(), scales.data_ptr(), weight.data_ptr()), _at(weight_scales), _at(bias), _at(low), _at(up),
        _at(branch_scales), _at(y_MN), (rows, outputs, wide, scales.shape[1], 0 if up is None else up.shape[1]),
        4 if weight.dtype == torch.uint8 else 8, torch.get_num_threads(),
    )  # fmt: skip


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
    dtype = x_MK.dtype
    y = torch.empty(len(x_MK), len(weight), dtype=dtype if dtype in _CODES else torch.float32)
    stretches = max(1, round(len(x_MK) / _STRETCH))
    length = max(1, -(-len(x_MK) // (stretches * _TILE))) * _TILE
    for x, part in zip(x_MK.split(length), y.split(length), strict=True):
        values, scales, low = quantize_activations(x, smooth_K, down_RK, *rounding)
        branch = None if down_RK is None else low
        _lowbit_into(part, values, scales, weight, weight_scales_NG, bias_N, branch, up_NR, branch_scales_R)
    return y.to(dtype)


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
    """(M, N) in x's dtype; x is read as a sum of digits, each rounded to 8 bits a group."""
    (rows, columns), wide = x_MK.shape, padded(x_MK.shape[1])
    left = x_MK.float() + shift
    left = left if smooth_K is None else left * (1 / smooth_K.float())
    digits, steps = [], []
    for _ in range(3 if x_MK.dtype in (torch.float32, torch.float64) else 2):
        digit, step, _ = quantize_activations(left, None, None, 8, GROUP, False, 0.0)
        digits.append(digit)
        steps.append(step)
        read = (digit.view(rows, wide // GROUP, GROUP) * step[..., None]).view(rows, wide)
        left = left - read[:, :columns]
    parts = lowbit_linear(
        torch.cat(digits), torch.cat(steps), weight, weight_scales_NG, None, None, None, None, torch.float32
    )
    y = parts.view(len(digits), rows, len(weight)).sum(0)
    if bias_N is not None:
        y += bias_N
    low = None if down_RK is None else x_MK.float() @ down_RK.float().T
    return add_branch(y, low, up_NR, branch_scales_R).to(x_MK.dtype)
