"""Triton kernels that round activations: `survey` finds magnitudes and projects down, `round_rows` rounds; `prepare`.

Shapes: M tokens, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches, S splits.

Design choices:
- A scale per token needs the whole row before the first value can be rounded, so x is swept twice (the second time
  mostly from L2); a scale per group needs one sweep, and `survey` does all of it.
- Few tokens are split along C so that a GPU is filled; the parts are joined in fixed order, never by atomics. For the
  fewest, `prepare` does all of it in one launch: a launch takes as long as their arithmetic.
- The steps are `reference`'s, in its order: divisions are IEEE's, and the launcher forbids fused multiply-adds, since
  either would move values across a rounding edge.
- A row with NaN gets the scale infinity and zero values, so that its outputs are NaN (0 * inf), as the reference's are.
"""

from __future__ import annotations

import triton
import triton.language as tl

_GROUP = tl.constexpr(64)
# 1.5 * 2^23: adding and taking off rounds a small float half to even, in hardware and in the interpreter
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(v: tl.tensor) -> tl.tensor:
    """|v| < 2^22. Only right where the compiler may not fuse the addition with a product before it."""
    return (v + _ROUNDER) - _ROUNDER


@triton.jit
def _smoothed(x: tl.tensor, smooth: tl.tensor, shift: tl.tensor, columns: tl.tensor, K: tl.tensor) -> tl.tensor:
    """A tile of x, shifted and smoothed, in fp32; columns of padding are zero."""
    v = x.to(tl.float32) + shift
    if smooth is not None:
        v = v * tl.math.div_rn(1.0, tl.load(smooth + columns, mask=columns < K, other=1.0).to(tl.float32))[None, :]
    return tl.where(columns[None, :] < K, v, 0.0)


@triton.jit
def _absmax(v: tl.tensor, UNSIGNED: tl.constexpr) -> tl.tensor:
    size = tl.maximum(v, 0.0) if UNSIGNED else tl.abs(v)
    return tl.max(tl.where(v != v, float("inf"), size), 1)


@triton.jit
def _rounded(v: tl.tensor, absmax: tl.tensor, TOP: tl.constexpr, UNSIGNED: tl.constexpr) -> tl.tensor:
    # a row of zeros may have any step
    per_step = tl.math.div_rn(tl.full(absmax.shape, TOP, tl.float32), tl.where(absmax == 0.0, 1.0, absmax))
    q = round_half_even(v * per_step[:, None])
    q = tl.where(q != q, 0.0, q)
    return tl.minimum(tl.maximum(q, 0.0 if UNSIGNED else -TOP), TOP).to(tl.int8)


@triton.jit
def survey(
    x: tl.tensor, smooth: tl.tensor, down: tl.tensor, values: tl.tensor, scales: tl.tensor, absmax_SM: tl.tensor,
    low_SMR: tl.tensor, shift: tl.tensor, M: tl.tensor, K: tl.tensor, G: tl.tensor, R: tl.tensor, span: tl.tensor,
    GROUPED: tl.constexpr, TOP: tl.constexpr, UNSIGNED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (row blocks, S, rank blocks): absmax (S, M) and low (S, M, R) of `span` columns; GROUPED (BLOCK_K is 64
    then) rounds them too. EXACT multiplies in fp32, for fp32 x or factors of another type."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split, ranks = tl.program_id(1), tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, at = rows[:, None] < M, rows[:, None].to(tl.int64)
    absmax = tl.zeros([BLOCK_M], tl.float32)
    low = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, G * _GROUP), BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        tile = tl.load(x + at * K + columns[None, :], mask=inside & (columns[None, :] < K), other=0.0)
        if down is not None:
            d = tl.load(
                down + ranks[None, :] * K + columns[:, None],
                mask=(ranks[None, :] < R) & (columns[:, None] < K),
                other=0.0,
            )
            if EXACT:
                low = tl.dot(tile.to(tl.float32), d.to(tl.float32), low, input_precision="ieee")
            else:
                low = tl.dot(tile, d, low)
        v = _smoothed(tile, smooth, shift, columns, K)
        if GROUPED:
            if tl.program_id(2) == 0:
                size = _absmax(v, UNSIGNED)
                tl.store(values + at * (G * _GROUP) + columns[None, :], _rounded(v, size, TOP, UNSIGNED), mask=inside)
                step = tl.math.div_rn(size, tl.full([BLOCK_M], TOP, tl.float32))
                tl.store(scales + rows.to(tl.int64) * G + start // BLOCK_K, step, mask=rows < M)
        else:
            absmax = tl.maximum(absmax, _absmax(v, UNSIGNED))
    if not GROUPED:
        if tl.program_id(2) == 0:
            tl.store(absmax_SM + split * M + rows, absmax, mask=rows < M)
    if down is not None:
        tl.store(low_SMR + (split * M + at) * R + ranks[None, :], low, mask=inside & (ranks[None, :] < R))


@triton.jit
def round_rows(
    x: tl.tensor, smooth: tl.tensor, absmax_SM: tl.tensor, low_SMR: tl.tensor, values: tl.tensor, scales: tl.tensor,
    low: tl.tensor, shift: tl.tensor, M: tl.tensor, K: tl.tensor, G: tl.tensor, R: tl.tensor,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, TOP: tl.constexpr, UNSIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (row blocks, column blocks): one scale per token; `low`, unless None, is the sum of its parts. BLOCK_S is
    the power of two from SPLITS on: the parts are read at once, not one after the other."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside, at = rows[:, None] < M, rows[:, None].to(tl.int64)
    split = tl.arange(0, BLOCK_S)[:, None]
    parts = tl.load(absmax_SM + split * M + rows[None, :], mask=(split < SPLITS) & (rows[None, :] < M), other=0.0)
    absmax = tl.max(parts, 0)
    tile = tl.load(x + at * K + columns[None, :], mask=inside & (columns[None, :] < K), other=0.0)
    q = _rounded(_smoothed(tile, smooth, shift, columns, K), absmax, TOP, UNSIGNED)
    tl.store(values + at * (G * _GROUP) + columns[None, :], q, mask=inside & (columns[None, :] < G * _GROUP))
    if tl.program_id(1) == 0:
        tl.store(scales + rows, tl.math.div_rn(absmax, tl.full([BLOCK_M], TOP, tl.float32)), mask=rows < M)
        if low is not None:
            for start in range(0, R, BLOCK_R):
                ranks = start + tl.arange(0, BLOCK_R)
                there = inside & (ranks[None, :] < R)
                total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
                for part in tl.static_range(SPLITS):
                    total += tl.load(low_SMR + (part * M + at) * R + ranks[None, :], mask=there, other=0.0)
                tl.store(low + at * R + ranks[None, :], total, mask=there)


@triton.jit
def prepare(
    x: tl.tensor, smooth: tl.tensor, down: tl.tensor, values: tl.tensor, scales: tl.tensor, low: tl.tensor,
    shift: tl.tensor, K: tl.tensor, G: tl.tensor, R: tl.tensor, TOP: tl.constexpr, UNSIGNED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (M, 1 + rank blocks), for few tokens: `survey` and `round_rows` in one launch, one scale per token. The
    first program of a row rounds it, WHOLE (a power of two) inputs at once; each other projects onto BLOCK_R ranks, in
    fp32."""
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        columns = tl.arange(0, WHOLE)
        one = row + tl.arange(0, 1)
        tile = tl.load(x + row * K + columns[None, :], mask=columns[None, :] < K, other=0.0)
        v = _smoothed(tile, smooth, shift, columns, K)
        absmax = _absmax(v, UNSIGNED)
        q = _rounded(v, absmax, TOP, UNSIGNED)
        tl.store(values + row * (G * _GROUP) + columns[None, :], q, mask=columns[None, :] < G * _GROUP)
        tl.store(scales + one, tl.math.div_rn(absmax, tl.full([1], TOP, tl.float32)))
    else:
        if down is not None:
            ranks = (tl.program_id(1) - 1) * BLOCK_R + tl.arange(0, BLOCK_R)
            sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
            for start in range(0, K, BLOCK_K):
                columns = start + tl.arange(0, BLOCK_K)
                a = tl.load(x + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
                there = (ranks[:, None] < R) & (columns[None, :] < K)
                b = tl.load(down + ranks[:, None] * K + columns[None, :], mask=there, other=0.0).to(tl.float32)
                sums += a[None, :] * b
            tl.store(low + row * R + ranks, tl.sum(sums, 1), mask=ranks < R)
