"""The ops in plain torch: the truth that every backend is compared with.

Shapes: M tokens, N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches.

Design choices:
- The steps of the rounding are part of the definition, since another order moves values across a rounding edge:
  v = (x + shift) * (1 / smooth), q = round_half_even(v * (top / absmax)), scale = absmax / top, all in fp32.
- Everything is computed in fp32, or in float64 where x is float64: so a test can separate a backend's error from
  the format's.
- `low` reads the raw x: `down` has 1 / smooth folded in, as published files have it.
- Speed does not count here: weights are expanded to a full matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mm.kernels.packing import integers_of, padded
from mm.kernels.two_steps import two_steps


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantize_activations(
    x_MK: Tensor, smooth_K: Tensor | None, down_RK: Tensor | None, bits: int, group: int, unsigned: bool, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    """int8 values (M, C), scales (M, 1 or G), low (M, R)."""
    work = _work_dtype(x_MK.dtype)
    rows, columns = x_MK.shape
    x = x_MK.to(work)
    low_MR = x @ down_RK.to(work).T if down_RK is not None else x.new_empty(rows, 0)
    v = x + shift
    if smooth_K is not None:
        v = v * (1 / smooth_K.to(work))
    wide = padded(columns)
    size = group or wide
    v_MGS = F.pad(v, (0, wide - columns)).view(rows, wide // size, size)
    top = (15 if unsigned else 7) if bits == 4 else 127
    absmax_MG1 = (v_MGS.clamp(min=0) if unsigned else v_MGS.abs()).amax(-1, keepdim=True)
    # `top / tensor` would be a reciprocal and a product, rounded twice
    per_step = torch.where(absmax_MG1 == 0, 0, torch.full_like(absmax_MG1, top) / absmax_MG1)
    values = (v_MGS * per_step).round().clamp(0 if unsigned else -top, top).nan_to_num(0)
    return values.to(torch.int8).view(rows, wide), (absmax_MG1 / top).squeeze(-1), low_MR


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
    """(M, N) in `dtype` from quantized activations, 4- or 8-bit weights, bias and branches."""
    work = _work_dtype(scales.dtype)
    weight_NC = _by_group(integers_of(weight), weight_scales_NG.to(work))
    y_MN = _by_group(values_MC, scales.to(work)) @ weight_NC.T
    return _finish(y_MN, bias_N, low_MR, up_NR, branch_scales_R).to(dtype)


rounded_linear = two_steps(quantize_activations, lowbit_linear)


def dense_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    down_RK: Tensor | None,
    up_NR: Tensor | None,
    branch_scales_R: Tensor | None,
) -> Tensor:
    """(M, N) in x's dtype from a 16-bit weight, bias and branches."""
    work = _work_dtype(x_MK.dtype)
    x = x_MK.to(work)
    low_MR = x @ down_RK.to(work).T if down_RK is not None else None
    return _finish(x @ weight_NK.to(work).T, bias_N, low_MR, up_NR, branch_scales_R).to(x_MK.dtype)


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
    """(M, N) in x's dtype from 4- or 8-bit weights, inputs as they are."""
    work = _work_dtype(x_MK.dtype)
    x = x_MK.to(work)
    v = x + shift if smooth_K is None else (x + shift) * (1 / smooth_K.to(work))
    weight_NK = _by_group(integers_of(weight), weight_scales_NG.to(work))[:, : v.shape[1]]
    low_MR = x @ down_RK.to(work).T if down_RK is not None else None
    return _finish(v @ weight_NK.T, bias_N, low_MR, up_NR, branch_scales_R).to(x_MK.dtype)


def _by_group(values: Tensor, scales: Tensor) -> Tensor:
    """Integers (rows, C) times scales (rows, 1 or G)."""
    rows, groups = scales.shape
    return (values.to(scales.dtype).view(rows, groups, values.shape[1] // groups) * scales[..., None]).view(
        values.shape
    )


def _finish(
    y_MN: Tensor, bias_N: Tensor | None, low_MR: Tensor | None, up_NR: Tensor | None, branch_scales_R: Tensor | None
) -> Tensor:
    if bias_N is not None:
        y_MN = y_MN + bias_N.to(y_MN.dtype)
    if low_MR is not None and up_NR is not None:
        low = low_MR.to(y_MN.dtype)
        low = low if branch_scales_R is None else low * branch_scales_R.to(low.dtype)
        y_MN = y_MN + low @ up_NR.to(low.dtype).T
    return y_MN
