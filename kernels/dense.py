"""The layer with a 16-bit weight, for the backends that leave its product to torch: cuBLAS and oneDNN tune that.

Shapes: M tokens, N outputs, K inputs, C = K up to whole groups of 64, G = C / 64, R = ranks of all branches.

Design choices:
- Only the branch is ours, added in place to the product.
- What a backend has no kernel for (8-bit weights, inputs that are not rounded) is expanded to 16 bits at every call.
- Accuracy is that of x's own type; `reference` computes in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.kernels.packing import GROUP, integers_of


def dense_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    down_RK: Tensor | None,
    up_NR: Tensor | None,
    branch_scales_R: Tensor | None,
) -> Tensor:
    """(M, N) in x's dtype from a 16-bit weight, bias and branches."""
    dtype = x_MK.dtype
    y_MN = torch.nn.functional.linear(x_MK, weight_NK.to(dtype), None if bias_N is None else bias_N.to(dtype))
    return add_branch(y_MN, None if down_RK is None else x_MK @ down_RK.to(dtype).T, up_NR, branch_scales_R)


def add_branch(y_MN: Tensor, low_MR: Tensor | None, up_NR: Tensor | None, branch_scales_R: Tensor | None) -> Tensor:
    """y += (low * branch_scales) up^T in y's type, where there is a branch."""
    if low_MR is None or up_NR is None:
        return y_MN
    low_MR = low_MR if branch_scales_R is None else low_MR * branch_scales_R.to(low_MR.dtype)
    return y_MN.addmm_(low_MR.to(y_MN.dtype), up_NR.to(y_MN.dtype).T)


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
    dtype = x_MK.dtype
    weight_NK = _expanded(weight, weight_scales_NG, dtype)[:, : x_MK.shape[1]]
    weight_NK = weight_NK if smooth_K is None else weight_NK / smooth_K.to(dtype)
    y_MN = dense_linear(x_MK, weight_NK, bias_N, down_RK, up_NR, branch_scales_R)
    return y_MN.add_(shift * weight_NK.sum(1)) if shift else y_MN


def expanded_lowbit_linear(
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
    """(M, N) in `dtype` from rounded inputs and 4- or 8-bit weights, in 16-bit products."""
    steps_MC = scales.to(dtype).repeat_interleave(values_MC.shape[1] // scales.shape[1], 1)
    x_MC = values_MC.to(dtype) * steps_MC
    y_MN = torch.nn.functional.linear(
        x_MC, _expanded(weight, weight_scales_NG, dtype), None if bias_N is None else bias_N.to(dtype)
    )
    return add_branch(y_MN, low_MR, up_NR, branch_scales_R)


def _expanded(weight: Tensor, weight_scales_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C) in `dtype`."""
    return integers_of(weight).to(dtype) * weight_scales_NG.to(dtype).repeat_interleave(GROUP, 1)
