"""The stored form of 4- and 8-bit weights, and how a matrix is rounded into 4 bits.

Shapes: N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64 groups.

Design choices:
- Row-major and device-neutral: uint8 (N, C / 2), row n holding its groups one after the other, 32 bytes each.
- Byte j of a group holds column j in its low half and column j + 32 in its high half, so that one mask and one shift
  give both halves of the group in their natural order, on any machine.
- A half holds value + 8 (offset binary). As unsigned bytes they go straight into the multiply-add instructions of CPUs,
  whose first operand is unsigned, and 8 pairs of products fit into a 16-bit sum (8 * 2 * 15 * 128 < 2^15). Padding
  holds zero, that is 8.
- Symmetric, [-7, 7] when rounded here; -8 is legal in a file made elsewhere.
- 8-bit weights are int8 (N, C) as they are: the type separates the two.
- `quantize_weight` rounds to nearest; mm.quantization chooses scales and values better.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 64
_HALF = GROUP // 2


def padded(columns: int) -> int:
    """Columns rounded up to whole groups."""
    return -(-columns // GROUP) * GROUP


def pack_int4(values_NK: Tensor) -> Tensor:
    """Integers in [-8, 7] to uint8 (N, C / 2)."""
    if values_NK.ndim != 2 or values_NK.is_floating_point():
        raise ValueError(f"4-bit weights are a matrix of integers, not {tuple(values_NK.shape)} {values_NK.dtype}")
    low, high = (int(end) for end in values_NK.aminmax()) if values_NK.numel() else (0, 0)
    if low < -8 or high > 7:
        raise ValueError(f"4-bit values lie in [-8, 7], these in [{low}, {high}]")
    rows, columns = values_NK.shape
    wide = padded(columns)
    offset_NGS = F.pad(values_NK.to(torch.int16) + 8, (0, wide - columns), value=8).view(rows, wide // GROUP, GROUP)
    packed = offset_NGS[..., :_HALF] | (offset_NGS[..., _HALF:] << 4)
    return packed.to(torch.uint8).reshape(rows, wide // 2)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 (N, C / 2) to int8 (N, C)."""
    rows, columns = packed.shape
    groups = packed.view(rows, columns // _HALF, _HALF)
    both = torch.cat([groups & 15, groups >> 4], -1).to(torch.int8) - 8
    return both.view(rows, 2 * columns)


def integers_of(weight: Tensor) -> Tensor:
    """int8 (N, C) of a stored weight, 4-bit (uint8) or 8-bit (int8)."""
    return unpack_int4(weight) if weight.dtype == torch.uint8 else weight


def quantize_weight(weight_NK: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Rounds to the nearest of 15 steps per group: packed uint8 (N, C / 2), scales (N, G) in `dtype`."""
    if weight_NK.ndim != 2:
        raise ValueError(f"a weight is a matrix (N, K), not {tuple(weight_NK.shape)}")
    rows, columns = weight_NK.shape
    wide = padded(columns)
    weight_NGS = F.pad(weight_NK.float(), (0, wide - columns)).view(rows, wide // GROUP, GROUP)
    # rounded to 16 bits before the division, so that values are rounded against the scale that is kept
    scales_NG = (weight_NGS.abs().amax(-1) / 7).to(dtype)
    steps_NG1 = torch.where(scales_NG == 0, 1, scales_NG.float())[..., None]
    values = (weight_NGS / steps_NG1).round_().clamp_(-7, 7).to(torch.int8)
    return pack_int4(values.view(rows, wide)), scales_NG
