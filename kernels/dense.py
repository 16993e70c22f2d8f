"""The layer with a 16-bit weight, for the backends that leave its product to torch: cuBLAS and oneDNN tune that.

Shapes: M tokens, N outputs, K inputs, R = ranks of all branches.

Design choice: only the branch is ours, added in place to the product.

It does not know accuracy above x's own type: `reference` computes in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    if down_RK is None or up_NR is None:
        return y_MN
    low_MR = x_MK @ down_RK.to(dtype).T
    low_MR = low_MR if branch_scales_R is None else low_MR * branch_scales_R.to(dtype)
    return y_MN.addmm_(low_MR, up_NR.to(dtype).T)
