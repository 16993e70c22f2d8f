"""Triton kernels of the 4-bit product: `few`, `grouped` (both exact) and, for many tokens, `expand` + `folded`.

Shapes: M tokens, N outputs, C = 64 G inputs in groups, R = ranks of all branches, S splits of C.

Design choices:
- Products are 8-bit integers with 32-bit sums: exact, and Hopper's wgmma where a tile has 64 rows. No GPU since Ada has
  4-bit products, and the 8-bit ones run twice as fast as bf16's.
- `grouped` takes weights apart in registers, sums a group in int32 and scales it in fp32: what `reference` computes, up
  to the rounding of fp32. `few` is the same in small tiles and split along C, since few tokens leave nothing to do but
  wait for weights, and that takes many loads at a time; `combine` adds the parts in a fixed order.
- Scaling every 64 columns costs as much as the products of a large tile. So for many tokens `expand` writes the weight
  once as int8 with a scale per output, and `folded` scales only at the end. The scale of an output is its largest
  group's over 16: groups that differ by powers of two (down to 1/16) are folded without error, others are off by at
  most half that scale a weight.
- Bias and branch join the sums before they leave the registers; the branch's products are tf32, or fp32 where outputs
  are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mm.kernels.triton.rounding import round_half_even

_GROUP = tl.constexpr(64)
_HALF = tl.constexpr(32)
_PER_NIBBLE = tl.constexpr(1 / 16)  # see `_nibbles`; a power of two rounds nothing
_FOLD_STEPS = tl.constexpr(16.0)  # -8 * 16 is int8's lowest value


@triton.jit
def _nibbles(both: tl.tensor) -> tl.tensor:
    """The two weights of each byte as int8, times 16: a nibble n stands for n - 8, and in the upper half of a byte
    (n - 8) * 16 is n with its top bit turned. So nothing is subtracted, and four bytes take one instruction or two."""
    early = ((both << 4) ^ 0x80).to(tl.int8, bitcast=True)
    late = ((both & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    return early, late


@triton.jit
def _finish(
    sums: tl.tensor, rows: tl.tensor, columns: tl.tensor, bias: tl.tensor, low: tl.tensor, up: tl.tensor,
    branch_scales: tl.tensor, y: tl.tensor, M: tl.tensor, N: tl.tensor, R: tl.tensor,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Adds bias and branch to a tile of fp32 sums, and stores it."""
    if bias is not None:
        sums += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if low is not None:
        for start in tl.range(0, R, BLOCK_R, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            ranks = start + tl.arange(0, BLOCK_R)
            a = tl.load(low + rows[:, None].to(tl.int64) * R + ranks[None, :], mask=rows[:, None] < M, other=0.0)
            if branch_scales is not None:
                a = a * tl.load(branch_scales + ranks).to(tl.float32)[None, :]
            b = tl.load(up + columns[None, :] * R + ranks[:, None], mask=columns[None, :] < N, other=0.0)
            sums = tl.dot(a, b.to(tl.float32), sums, input_precision=PRECISION)
    there = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y + rows[:, None].to(tl.int64) * N + columns[None, :], sums.to(y.dtype.element_ty), mask=there)


@triton.jit
def grouped(
    values: tl.tensor, scales: tl.tensor, packed: tl.tensor, weight_scales: tl.tensor, bias: tl.tensor, low: tl.tensor,
    up: tl.tensor, branch_scales: tl.tensor, y: tl.tensor, M: tl.tensor, N: tl.tensor, G: tl.tensor, R: tl.tensor,
    BY_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (column blocks, row blocks): y (M, N). BY_GROUP: activations have a scale per group, else per token."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tl.arange(0, _HALF)
    # rows and columns beyond the end repeat the last one and are not stored
    row, column = tl.minimum(rows, M - 1).to(tl.int64), tl.minimum(columns, N - 1).to(tl.int64)
    a_at = values + row[:, None] * (G * _GROUP) + half[None, :]
    w_at = packed + column[None, :] * (G * _HALF) + half[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(G):
        early, late = _nibbles(tl.load(w_at + group * _HALF))
        part = tl.dot(tl.load(a_at + group * _GROUP), early, out_dtype=tl.int32)
        part = tl.dot(tl.load(a_at + group * _GROUP + _HALF), late, part, out_dtype=tl.int32)
        step = tl.load(weight_scales + column * G + group).to(tl.float32)[None, :] * _PER_NIBBLE
        if BY_GROUP:
            step = step * tl.load(scales + row * G + group)[:, None]
        sums += part.to(tl.float32) * step
    if not BY_GROUP:
        sums *= tl.load(scales + row)[:, None]
    _finish(sums, rows, columns, bias, low, up, branch_scales, y, M, N, R, BLOCK_R, PRECISION)


@triton.jit
def few(
    values: tl.tensor, scales: tl.tensor, packed: tl.tensor, weight_scales: tl.tensor, bias: tl.tensor, low: tl.tensor,
    up: tl.tensor, branch_scales: tl.tensor, y: tl.tensor, M: tl.tensor, N: tl.tensor, G: tl.tensor, R: tl.tensor,
    span: tl.tensor, BY_GROUP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """`grouped` for few tokens. Grid (column blocks, row blocks, S); with SPLIT, y is (S, M, N), each part the sum of
    `span` groups."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tl.arange(0, _HALF)
    row, column = tl.minimum(rows, M - 1).to(tl.int64), tl.minimum(columns, N - 1).to(tl.int64)
    first = tl.program_id(2) * span
    inside = rows[:, None] < M  # rows that are not there are not read
    a_at = values + rows[:, None].to(tl.int64) * (G * _GROUP) + half[None, :]
    w_at = packed + column[None, :] * (G * _HALF) + half[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum(first + span, G)
    following = tl.load(weight_scales + column * G + first)  # a step ahead: loads of 2 bytes are not pipelined
    for group in range(first, last):
        step = following.to(tl.float32)[None, :] * _PER_NIBBLE
        following = tl.load(weight_scales + column * G + tl.minimum(group + 1, last - 1))
        early, late = _nibbles(tl.load(w_at + group * _HALF))
        part = tl.dot(tl.load(a_at + group * _GROUP, mask=inside, other=0), early, out_dtype=tl.int32)
        part = tl.dot(tl.load(a_at + group * _GROUP + _HALF, mask=inside, other=0), late, part, out_dtype=tl.int32)
        if BY_GROUP:
            step = step * tl.load(scales + row * G + group)[:, None]
        sums += part.to(tl.float32) * step
    if not BY_GROUP:
        sums *= tl.load(scales + row)[:, None]
    if SPLIT:
        at = y + (tl.program_id(2) * M + rows[:, None].to(tl.int64)) * N + columns[None, :]
        tl.store(at, sums, mask=inside & (columns[None, :] < N))
    else:
        _finish(sums, rows, columns, bias, low, up, branch_scales, y, M, N, R, BLOCK_R, PRECISION)


@triton.jit
def combine(
    parts_SMN: tl.tensor, bias: tl.tensor, low: tl.tensor, up: tl.tensor, branch_scales: tl.tensor, y: tl.tensor,
    M: tl.tensor, N: tl.tensor, R: tl.tensor, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (column blocks, row blocks): the parts of `few`, added in a fixed order, with bias and branch. BLOCK_S is
    the power of two from SPLITS on: all parts are read at once."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.arange(0, BLOCK_S)[:, None, None]
    at = parts_SMN + (split * M + rows[None, :, None].to(tl.int64)) * N + columns[None, None, :]
    there = (split < SPLITS) & (rows[None, :, None] < M) & (columns[None, None, :] < N)
    sums = tl.sum(tl.load(at, mask=there, other=0.0), 0)
    _finish(sums, rows, columns, bias, low, up, branch_scales, y, M, N, R, BLOCK_R, PRECISION)


@triton.jit
def expand(
    packed: tl.tensor, weight_scales: tl.tensor, weight: tl.tensor, channel_scales: tl.tensor, N: tl.tensor,
    G: tl.tensor, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (row blocks of the weight, blocks of BLOCK_C groups): int8 (N, C) with a scale per row, fp32 (N,)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    each = tl.arange(0, BLOCK_G)
    row = tl.minimum(rows, N - 1).to(tl.int64)[:, None]
    steps = tl.abs(tl.load(weight_scales + row * G + each[None, :], mask=each[None, :] < G, other=0.0))
    steps = steps.to(tl.float32)
    # a scale that is no number makes the whole output none: its ratio is 0 and 0 * inf is NaN
    channel = tl.max(tl.where(steps != steps, float("inf"), steps), 1) * (1 / _FOLD_STEPS)
    if tl.program_id(1) == 0:
        tl.store(channel_scales + rows, channel, mask=rows < N)
    group = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    step = tl.load(weight_scales + row * G + group, mask=group < G, other=0.0).to(tl.float32)
    ratio = tl.math.div_rn(step, tl.where(channel == 0.0, 1.0, channel)[:, None])[:, :, None]
    at = group[:, :, None] * _HALF + tl.arange(0, _HALF)[None, None, :]
    columns = group[:, :, None] * _GROUP + tl.arange(0, _HALF)[None, None, :]
    there = (rows[:, None, None] < N) & (group[:, :, None] < G)
    both = tl.load(packed + row[:, :, None] * (G * _HALF) + at, mask=there, other=0)
    for half in tl.static_range(2):
        q = ((both >> (4 * half)) & 15).to(tl.float32) - 8.0
        folded_q = tl.minimum(round_half_even(q * ratio), 127.0)
        tl.store(weight + row[:, :, None] * (G * _GROUP) + columns + half * _HALF, folded_q.to(tl.int8), mask=there)


@triton.jit
def folded(
    values: tl.tensor, scales: tl.tensor, weight: tl.tensor, channel_scales: tl.tensor, bias: tl.tensor, low: tl.tensor,
    up: tl.tensor, branch_scales: tl.tensor, y: tl.tensor, M: tl.tensor, N: tl.tensor, G: tl.tensor, R: tl.tensor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BAND: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (tiles,): y (M, N) from int8 (M, C) with a scale per row and int8 (N, C) with a scale per row. BLOCK_K
    divides C. Tiles go in bands of BAND row blocks, so that those which run together share operands in L2."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inner = tl.program_id(0) % (BAND * across)
    rows = (band * BAND + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (inner // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = tl.minimum(rows, M - 1).to(tl.int64), tl.minimum(columns, N - 1).to(tl.int64)
    inputs = tl.arange(0, BLOCK_K)
    a_at = values + row[:, None] * (G * _GROUP) + inputs[None, :]
    b_at = weight + column[None, :] * (G * _GROUP) + inputs[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, G * _GROUP, BLOCK_K):
        total = tl.dot(tl.load(a_at + start), tl.load(b_at + start), total, out_dtype=tl.int32)
    sums = total.to(tl.float32) * tl.load(scales + row)[:, None] * tl.load(channel_scales + column)[None, :]
    _finish(sums, rows, columns, bias, low, up, branch_scales, y, M, N, R, BLOCK_R, PRECISION)
