"""A layer that rounds its inputs, from a backend's two ops one after the other.

A backend that can do better (`cpu`) has a `rounded_linear` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def two_steps(quantize_activations: Callable[..., Any], lowbit_linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `rounded_linear` of these two."""

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
        values, scales, low = quantize_activations(x_MK, smooth_K, down_RK, *rounding)
        low = None if down_RK is None else low
        return lowbit_linear(values, scales, weight, weight_scales_NG, bias_N, low, up_NR, branch_scales_R, x_MK.dtype)

    return rounded_linear
