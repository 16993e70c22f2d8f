"""The Triton backend: NVIDIA GPUs from Ampere on, with 8-bit products (wgmma on Hopper) on 4-bit weights;
8-bit ones are expanded to 16 bits.

Shapes: M tokens, N outputs, K inputs, R = ranks of all branches.

Design choices:
- Absolute imports only: inside this package `triton` is the compiler, `mm.kernels.triton` is this.
- With TRITON_INTERPRET=1 the kernels run on the CPU, in numpy: for tests, thousands of times slower.
- All visible GPUs must be new enough: the choice of backend is one for the process (CUDA_VISIBLE_DEVICES hides a GPU).
"""

from __future__ import annotations

import torch

from mm.kernels.dense import dense_linear, weight_only_linear
from mm.kernels.two_steps import two_steps

_missing: str | None = None
try:
    from mm.kernels.triton.launch import INTERPRETED, lowbit_linear, quantize_activations

    rounded_linear = two_steps(quantize_activations, lowbit_linear)
except ImportError as error:
    _missing = f"triton does not load ({error}); `pip install 'mm-gen[triton]'` brings it on Linux"

_LEAST = (8, 0)

__all__ = ["absence", "dense_linear", "lowbit_linear", "quantize_activations", "rounded_linear", "weight_only_linear"]


def absence() -> str | None:
    """Why this backend is not there; None where it is."""
    if _missing or INTERPRETED:
        return _missing
    if torch.version.hip or not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    weakest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if weakest < _LEAST:
        return f"it needs GPUs of compute capability 8.0 or newer, and one here has {weakest[0]}.{weakest[1]}"
    return None
