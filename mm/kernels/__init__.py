"""The ops that linear layers are made of, one module per backend; `mm doctor` lists those it finds.

The code lies in the root folder `kernels/`, or beside this file in an installed wheel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm.core.lazy import adopt, loader

adopt(__path__, "kernels")

if TYPE_CHECKING:
    from mm.kernels.dispatch import backends, use_backend
    from mm.kernels.ops import branched_linear, lowbit_linear, quantize_activations
    from mm.kernels.packing import pack_int4, quantize_weight, unpack_int4

__all__ = [
    "quantize_activations",
    "lowbit_linear",
    "branched_linear",
    "quantize_weight",
    "pack_int4",
    "unpack_int4",
    "backends",
    "use_backend",
]
__getattr__ = loader(
    "mm.kernels",
    {
        **dict.fromkeys(("quantize_activations", "lowbit_linear", "branched_linear"), "ops"),
        **dict.fromkeys(("quantize_weight", "pack_int4", "unpack_int4"), "packing"),
        **dict.fromkeys(("backends", "use_backend"), "dispatch"),
    },
)
