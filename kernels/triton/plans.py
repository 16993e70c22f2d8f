"""Tile sizes and splits of the Triton kernels, as functions of a layer's shape and the GPU's capability.

Design choices:
- Nothing is tuned at run time: the same shape gets the same tiles in every process, so its sums are added in the same
  order and a picture stays the same. Splits do not depend on the GPU, so neither do results of `few`.
- The sizes are the fastest of those that were timed on an H100 (docs/kernels-gpu.md); other GPUs have not been timed.
- Shared memory of a tile stays below what its capability has (tests/test_triton.py asserts it for compiled kernels).
- From `FOLD_FROM` tokens on, writing the weight once as int8 pays off against taking it apart in every tile: at 256
  tokens it halves the time.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW = 64
PREPARE = 16  # tokens up to which one kernel rounds and projects, if a row has at most WIDEST inputs
WIDEST = 16384
FOLD_FROM = 65
_PROGRAMS = 128  # about the multiprocessors of a large GPU
_LEAST_ROWS = 16  # of a tl.dot


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One launch: rows, columns and depth (inputs a step) of a tile, warps, stages of the loads' pipeline, splits."""

    rows: int
    columns: int
    depth: int = 64
    warps: int = 4
    stages: int = 3
    splits: int = 1


def blocks(length: int, size: int) -> int:
    """How many blocks cover a length."""
    return -(-length // size)


def power(length: int) -> int:
    """The least power of two that is not below a length."""
    return 1 << max(0, length - 1).bit_length()


def span(length: int, splits: int) -> tuple[int, int]:
    """How many of `length` steps each split takes, and how many splits that makes (none empty)."""
    each = blocks(length, max(1, splits))
    return each, blocks(length, each)


def rounding(tokens: int, wide: int, rank: int, group: int, itemsize: int = 2) -> Tiles:
    """`survey` and `round_rows`; columns are those of the branch, whose factor has elements of `itemsize` bytes."""
    columns = min(128 // itemsize, max(16, power(rank)))
    depth = group or 128
    programs = blocks(tokens, _LEAST_ROWS) * max(1, blocks(rank, columns))
    splits = min(max(1, 8 * _PROGRAMS // programs), blocks(wide, 2 * depth))
    return Tiles(rows=_LEAST_ROWS, columns=columns, depth=depth, splits=span(blocks(wide, depth), splits)[1])


def prepare(wide: int, rank: int) -> Tiles:
    """One row in a program; `columns` ranks of it in each of the others, `depth` inputs at a time."""
    return Tiles(rows=1, columns=2 if rank % 2 == 0 else 1, depth=min(4096, power(wide)), warps=8)


def few(tokens: int, outputs: int, wide: int) -> Tiles:
    """The exact product for up to FEW tokens, split along the inputs until enough programs wait for weights."""
    rows, groups = max(_LEAST_ROWS, power(tokens)), wide // 64
    if rows == _LEAST_ROWS:  # one warp, and rows of at most 24 groups
        return Tiles(rows=rows, columns=16, warps=1, stages=8, splits=span(groups, blocks(groups, 24))[1])
    splits = min(max(1, 6 * _PROGRAMS // blocks(outputs, 64)), blocks(groups, 2), 16)
    return Tiles(rows=rows, columns=64, stages=4, splits=span(groups, splits)[1])


def combine(tokens: int, splits: int) -> Tiles:
    """Joining the parts of `few`: tiles so small that all parts of one fit into registers."""
    return Tiles(rows=_LEAST_ROWS, columns=64 if splits <= 4 else 32, warps=4)


def grouped() -> Tiles:
    """The exact product for more: two warps, since weights taken apart for `wgmma` would go through shared memory."""
    return Tiles(rows=64, columns=64, warps=2, stages=4)


def folded(tokens: int, outputs: int, wide: int, capability: tuple[int, int], itemsize: int = 2) -> Tiles:
    """The product of int8 matrices: 128 x 256 where the chip has shared memory for it, the layer is wide, and outputs
    are of 16 bits (`itemsize` bytes: with fp32 the branch needs registers that the sums hold)."""
    depth = 128 if wide % 128 == 0 else 64
    if tokens < 1024:  # more and smaller tiles, to fill the GPU
        return Tiles(rows=64, columns=128, depth=depth, warps=4, stages=4 if capability[0] in (9, 10) else 3)
    large = capability[0] in (9, 10) and outputs >= 256 and itemsize == 2
    return Tiles(rows=128, columns=256 if large else 128, depth=depth, warps=8)
