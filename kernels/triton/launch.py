"""The ops on Triton kernels: torch tensors in and out, allocation, choice of kernel, launches.

Shapes: M tokens, N outputs, K inputs, C = K rounded up to whole groups of 64, G = C / 64, R = ranks of all branches.

Design choices:
- `ops` has checked shapes; here tensors are made contiguous and workspaces come from torch's allocator, which hands the
  same memory to one layer after the other.
- From `plans.FOLD_FROM` tokens on, with a scale per token, products run on weights folded to int8; `MM_KERNELS_EXACT=1`
  keeps to the exact kernel, for comparison and bug reports.
- Everything is added in fixed order: results do not change from run to run.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from mm.kernels.dense import expanded_lowbit_linear
from mm.kernels.packing import GROUP, padded
from mm.kernels.triton import plans
from mm.kernels.triton.products import combine, expand, few, folded, grouped
from mm.kernels.triton.rounding import prepare, round_rows, survey

INTERPRETED = bool(triton.knobs.runtime.interpret)
_EXPAND_ROWS, _EXPAND_GROUPS = 16, 8


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's GPU."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if not INTERPRETED:
        raise ValueError(f"the triton backend reads tensors on a GPU, not on {tensor.device}")
    return nullcontext()


def _capability(tensor: Tensor) -> tuple[int, int]:
    """The GPU's; Hopper's in the interpreter."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: Any) -> None:
    """Untyped: what a kernel calls a tensor is a pointer or a number here."""
    kernel[grid](*arguments, **options)


def _flat(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, of a type that the kernels read."""
    if tensor is None:
        return None
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()


def quantize_activations(
    x_MK: Tensor, smooth_K: Tensor | None, down_RK: Tensor | None, bits: int, group: int, unsigned: bool, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, smooth, down = _flat(x_MK), _flat(smooth_K), _flat(down_RK)
    assert x is not None
    rows, columns = x.shape
    wide, rank = padded(columns), 0 if down is None else down.shape[0]
    values = x.new_empty(rows, wide, dtype=torch.int8)
    scales = x.new_empty(rows, wide // group if group else 1, dtype=torch.float32)
    if not rows:
        return values, scales, x.new_empty(rows, rank, dtype=torch.float32)
    down = down if rank else None
    if not group and rows <= plans.PREPARE and wide <= plans.WIDEST:
        return _prepared(x, smooth, down, values, scales, float(_top(bits, unsigned)), unsigned, shift)
    tiles = plans.rounding(rows, wide, rank, group, 2 if down is None else down.element_size())
    each, splits = plans.span(plans.blocks(wide, tiles.depth), tiles.splits)
    absmax_SM = None if group else scales.new_empty(splits, rows)
    low_SMR = scales.new_empty(splits, rows, rank)
    row_blocks, step_blocks = plans.blocks(rows, tiles.rows), plans.blocks(wide, tiles.depth)
    low = low_SMR[0] if splits == 1 else scales.new_empty(rows, rank)
    sizes = (shift, rows, columns, wide // GROUP, rank)
    options: dict[str, Any] = {
        "TOP": float(_top(bits, unsigned)),
        "UNSIGNED": unsigned,
        "BLOCK_M": tiles.rows,
        "BLOCK_K": tiles.depth,
        "BLOCK_R": tiles.columns,
        "num_warps": tiles.warps,
        "enable_fp_fusion": False,
    }
    surveyed: dict[str, Any] = {
        "GROUPED": group > 0,
        # Triton's interpreter multiplies the bits of bf16, as if they were integers
        "EXACT": INTERPRETED or x.dtype == torch.float32 or down is None or x.dtype != down.dtype,
    }
    with _on(x):
        found = (x, smooth, down, values, scales, absmax_SM, low_SMR, *sizes, each * tiles.depth)
        rank_blocks = max(1, plans.blocks(rank, tiles.columns))
        _launch(survey, (row_blocks, splits, rank_blocks), found, **surveyed, **options)
        if not group:
            joined = low if splits > 1 and rank else None
            taken = (x, smooth, absmax_SM, low_SMR, values, scales, joined, *sizes)
            parts = {"SPLITS": splits, "BLOCK_S": plans.power(splits)}
            _launch(round_rows, (row_blocks, step_blocks), taken, **parts, **options)
        elif splits > 1:
            low = low_SMR.sum(0)
    return values, scales, low


def _top(bits: int, unsigned: bool) -> int:
    """The largest rounded value."""
    return (15 if unsigned else 7) if bits == 4 else 127


def _prepared(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, values: Tensor, scales: Tensor, top: float, unsigned: bool,
    shift: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`quantize_activations` of few tokens, in one launch."""
    (rows, columns), wide, rank = x.shape, values.shape[1], 0 if down is None else down.shape[0]
    low = scales.new_empty(rows, rank)
    tiles = plans.prepare(wide, rank)
    grid = (rows, 1 + (plans.blocks(rank, tiles.columns) if rank else 0))
    with _on(x):
        _launch(
            prepare, grid, (x, smooth, down, values, scales, low, shift, columns, wide // GROUP, rank),
            TOP=top, UNSIGNED=unsigned, WHOLE=plans.power(wide), BLOCK_R=tiles.columns, BLOCK_K=tiles.depth,
            num_warps=tiles.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return values, scales, low


def lowbit_linear(
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
    if weight.dtype == torch.int8:
        return expanded_lowbit_linear(
            values_MC, scales, weight, weight_scales_NG, bias_N, low_MR, up_NR, branch_scales_R, dtype
        )
    y = values_MC.new_empty(values_MC.shape[0], weight.shape[0], dtype=torch.float32 if dtype.itemsize > 4 else dtype)
    if not y.numel():
        return y.to(dtype)
    rank = 0 if low_MR is None else low_MR.shape[1]
    low, up = (low_MR, up_NR) if rank else (None, None)
    branch = (_flat(None if low is None else low.float()), _flat(up), _flat(branch_scales_R) if rank else None)
    operands = (values_MC.contiguous(), scales.float().contiguous(), weight.contiguous(), _flat(weight_scales_NG))
    with _on(y):
        if scales.shape[1] == 1 and y.shape[0] >= plans.FOLD_FROM and os.environ.get("MM_KERNELS_EXACT", "0") != "1":
            _folded(operands, (_flat(bias_N), *branch), y, rank)
        else:
            _grouped(operands, (_flat(bias_N), *branch), y, rank)
    return y.to(dtype)


def _options(y: Tensor, rank: int, tiles: plans.Tiles) -> dict[str, Any]:
    return {
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_R": 16 if rank % 32 else 32,
        "PRECISION": "ieee" if y.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _grouped(operands: tuple[Any, ...], ends: tuple[Any, ...], y: Tensor, rank: int) -> None:
    """The exact product."""
    (rows, wide), outputs, by_group = operands[0].shape, y.shape[1], operands[1].shape[1] > 1
    tiles = plans.few(rows, outputs, wide) if rows <= plans.FEW else plans.grouped()
    options, sizes = _options(y, rank, tiles), (rows, outputs, wide // GROUP, rank)
    grid = (plans.blocks(outputs, tiles.columns), plans.blocks(rows, tiles.rows))
    if rows > plans.FEW:
        _launch(grouped, grid, (*operands, *ends, y, *sizes), BY_GROUP=by_group, **options)
        return
    each, splits = plans.span(wide // GROUP, tiles.splits)
    parts = y if splits == 1 else y.new_empty(splits, rows, outputs, dtype=torch.float32)
    taken = (*operands, *ends, parts, *sizes, each)
    _launch(few, (*grid, splits), taken, BY_GROUP=by_group, SPLIT=splits > 1, **options)
    if splits > 1:
        join = plans.combine(rows, splits)
        grid = (plans.blocks(outputs, join.columns), plans.blocks(rows, join.rows))
        taken = (parts, *ends, y, rows, outputs, rank)
        _launch(combine, grid, taken, SPLITS=splits, BLOCK_S=plans.power(splits), **_options(y, rank, join))


def _folded(operands: tuple[Any, ...], ends: tuple[Any, ...], y: Tensor, rank: int) -> None:
    """The product for many tokens: weights folded to int8, one scale per output."""
    values, scales, packed, weight_scales = operands
    (rows, wide), outputs = values.shape, y.shape[1]
    weight, channel_scales = fold(packed, weight_scales)
    tiles = plans.folded(rows, outputs, wide, _capability(y), y.element_size())
    count = plans.blocks(rows, tiles.rows) * plans.blocks(outputs, tiles.columns)
    taken = (values, scales, weight, channel_scales, *ends, y, rows, outputs, wide // GROUP, rank)
    _launch(folded, (count,), taken, BLOCK_K=tiles.depth, BAND=8, **_options(y, rank, tiles))


def fold(packed: Tensor, weight_scales_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Packed weights as int8 (N, C) with one fp32 scale per output (N,)."""
    outputs, wide = packed.shape[0], 2 * packed.shape[1]
    weight = packed.new_empty(outputs, wide, dtype=torch.int8)
    channel_scales = packed.new_empty(outputs, dtype=torch.float32)
    grid = (plans.blocks(outputs, _EXPAND_ROWS), plans.blocks(wide // GROUP, _EXPAND_GROUPS))
    sizes = {"BLOCK_N": _EXPAND_ROWS, "BLOCK_C": _EXPAND_GROUPS, "BLOCK_G": plans.power(wide // GROUP)}
    taken = (packed, weight_scales_NG, weight, channel_scales, outputs, wide // GROUP)
    with _on(packed):
        _launch(expand, grid, taken, enable_fp_fusion=False, **sizes)
    return weight, channel_scales
