"""How Nunchaku's files order the numbers of a quantized layer, by tiles of a GPU's instruction; here they become rows.

Design choices
- One function a kind of tensor, each a view and a permutation of whole tensors. Bytes are taken apart as bytes, so the
  machine's byte order does not matter.
- Rows and columns are padded to 128 in files (not in AWQ's); callers cut them off.

The order, as the kernels read it (n a row, k a column, least significant digit last):
- weights: words of 8 columns; n = tile (128), pack (16), half (8), lane; k = tile (64), half (32), lane (8), nibble.
- vectors, and scales of a group of 64: n = tile (128), block (16), half (8), lane (2), parity.
- fp8 scales of a group of 16: n = tile (128), quarter (32), octet (8), lane; four groups side by side.
- branches: 16 x 16 tiles, first index = half (8), lane; second = half (8), lane (2), parity.
- AWQ (4-bit weights, 16-bit inputs): 4 rows and 64 columns a tile; 16 bits hold columns b, b + 8, b + 16, b + 24.

Legend: N outputs, K inputs, G groups, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
# e2m1: one sign bit, two of exponent, one of mantissa
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def tiled(size: int) -> int:
    """A size rounded up to whole tiles."""
    return -(-size // TILE) * TILE


def unpack_codes(packed: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 (N, K), of 4-bit weights (N, K / 2) in bytes."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    tiles = packed.contiguous().view(torch.uint8).view(rows // TILE, columns // 64, 8, 8, 4, 2, 2, 4)
    return _nibbles(tiles).permute(0, 2, 5, 3, 1, 6, 4, 7, 8).reshape(rows, columns)


def signed(codes: Tensor) -> Tensor:
    """Two's complement of 4 bits: int8 in [-8, 7]."""
    return (codes.to(torch.int8) ^ 8) - 8


def unpack_vector(packed: Tensor) -> Tensor:
    """One number a row (or column): (N,)."""
    return unpack_scales(packed[None])[:, 0]


def unpack_scales(packed: Tensor) -> Tensor:
    """(N, G) of 16-bit scales (G, N)."""
    groups, rows = packed.shape
    return packed.reshape(rows // TILE, groups, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """(N, G) of fp8 scales (G, N), a group of 16 each."""
    groups, rows = packed.shape
    tiles = packed.contiguous().view(torch.uint8).view(rows // TILE, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups).view(packed.dtype)


def unpack_down(packed: Tensor) -> Tensor:
    """(R, K) of a branch's first matrix (K, R)."""
    return _branch_tiles(packed).permute(1, 4, 2, 0, 5, 3, 6).reshape(packed.shape[1], packed.shape[0])


def unpack_up(packed: Tensor) -> Tensor:
    """(N, R) of a branch's second matrix (N, R)."""
    return _branch_tiles(packed).permute(0, 4, 2, 1, 5, 3, 6).reshape(packed.shape)


def unpack_awq(packed: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 (N, K), of AWQ weights int32 (N / 4, K / 2)."""
    rows, columns = packed.shape[0] * 4, packed.shape[1] * 2
    tiles = packed.contiguous().view(torch.uint8).view(rows // 4, columns // 64, 4, 2, 8, 2)
    return _nibbles(tiles).permute(0, 2, 1, 3, 5, 6, 4).reshape(rows, columns)


def _branch_tiles(packed: Tensor) -> Tensor:
    channels, rank = packed.shape
    return packed.reshape(channels // 16, rank // 16, 8, 4, 2, 2, 2)


def _nibbles(packed: Tensor) -> Tensor:
    """Low and high halves of bytes, in one more dimension."""
    return torch.stack([packed & 15, packed >> 4], -1)
