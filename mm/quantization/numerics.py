"""The arithmetic of SVDQuant on matrices: rounding, low rank, error feedback.

Design choices
- Errors are measured through H = X^T X / M of the calibration rows: |X E^T|^2 / M = sum(E H * E). That is the output
  error itself, for the price of one product, however many rows there were; where the rows are fewer than the inputs,
  they are the cheaper of the two and H is never formed (`Gram`): 15,360 inputs of FLUX would make it 0.9 GB.
- GPTQ's factor costs the cube of its inputs, so error is fed back within spans of the most active `SPAN` columns.
- Scales are searched a little below absmax: clipping the largest weight of a group often costs less than the coarser
  step that keeps it.
- Randomized SVD (Halko et al. 2011, arXiv 0909.4061) with a generator of its own: same seed, same bytes.

Legend: M rows, N outputs, K inputs, G = K / 64 groups (the last may be short), R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.packing import GROUP, pack_int4, padded

LEVELS = {4: 7, 8: 127}
SPAN = 4096  # columns that GPTQ treats together
PORTION = 1 << 18  # weights treated together where temporaries count


@dataclass(frozen=True, slots=True)
class Rounded:
    """Integers (N, K) in int8 and scales (N, G) in the type they will be kept in."""

    values: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """(N, K) in fp32."""
        return _stretched(self.values.float(), self.scales)

    def packed(self, bits: int) -> Tensor:
        """As `BranchedLinear` keeps it: uint8 (N, C / 2) for 4 bits, int8 (N, C) for 8."""
        if bits == 4:
            return pack_int4(self.values)
        return F.pad(self.values, (0, padded(self.values.shape[1]) - self.values.shape[1]))


def _stretched(values_NK: Tensor, scales_NG: Tensor) -> Tensor:
    """Values times the scale of their group; changes float values in place where they fill whole groups."""
    columns = values_NK.shape[1]
    grouped = _groups(values_NK).mul_(scales_NG.float()[..., None])
    return grouped.flatten(1)[:, :columns]


def _groups(weight_NK: Tensor) -> Tensor:
    columns = weight_NK.shape[1]
    return F.pad(weight_NK, (0, padded(columns) - columns)).view(weight_NK.shape[0], -1, GROUP)


def group_scales(weight_NK: Tensor, bits: int, dtype: torch.dtype, importance_K: Tensor | None = None) -> Tensor:
    """Scales (N, G): absmax over the largest level, or a little less where that errs less (weighted by importance)."""
    weight_1GS = None if importance_K is None else _groups(importance_K.float()[None])
    return torch.cat([_scales(_groups(rows.float()), bits, dtype, weight_1GS) for rows in _in_cache(weight_NK)])


def _in_cache(matrix_NK: Tensor) -> tuple[Tensor, ...]:
    """Rows in portions whose temporaries stay in a core's cache, far faster than the whole of a large matrix."""
    return matrix_NK.split(max(1, PORTION // max(matrix_NK.shape[1], 1)))


def _scales(weight_NGS: Tensor, bits: int, dtype: torch.dtype, weight_1GS: Tensor | None) -> Tensor:
    top = weight_NGS.abs().amax(-1) / LEVELS[bits]
    if weight_1GS is None:
        return top.to(dtype)
    best = torch.full_like(top, torch.inf)
    chosen = top.to(dtype)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        scales = (top * shrink).to(dtype)
        steps = torch.where(scales == 0, 1, scales.float())[..., None]
        rounded = (weight_NGS / steps).round_().clamp_(-LEVELS[bits], LEVELS[bits]) * steps
        error = ((rounded - weight_NGS).square() * weight_1GS).sum(-1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scales, chosen)
    return chosen


def round_to_nearest(weight_NK: Tensor, scales_NG: Tensor, bits: int) -> Rounded:
    """Every weight to its nearest level."""
    values = torch.empty_like(weight_NK, dtype=torch.int8)
    start = 0
    for rows in _in_cache(weight_NK):
        stop = start + len(rows)
        steps = scales_NG[start:stop].float().repeat_interleave(GROUP, 1)[:, : weight_NK.shape[1]]
        levels = (rows.float() / torch.where(steps == 0, 1, steps)).round_().clamp_(-LEVELS[bits], LEVELS[bits])
        values[start:stop] = levels.to(torch.int8)
        start = stop
    return Rounded(values, scales_NG)


def low_rank(matrix_NK: Tensor, rank: int, generator: torch.Generator, turns: int = 2) -> tuple[Tensor, Tensor]:
    """The best product up (N, R) @ down (R, K) of a matrix, nearly; both factors carry half of the singular values.

    Matrices may be stacked, (..., N, K): all of them are probed with the same numbers.
    """
    rows, columns = matrix_NK.shape[-2:]
    rank = min(rank, rows, columns)
    wide = min(rank + 8, rows, columns)
    probe = torch.randn(columns, wide, generator=generator).to(matrix_NK)
    basis = torch.linalg.qr(matrix_NK @ probe)[0]
    for _ in range(turns):
        basis = torch.linalg.qr(matrix_NK @ torch.linalg.qr(matrix_NK.mT @ basis)[0])[0]
    left, sizes, right = torch.linalg.svd(basis.mT @ matrix_NK, full_matrices=False)
    root = sizes[..., :rank].sqrt()
    return (basis @ left[..., :rank]) * root[..., None, :], right[..., :rank, :] * root[..., None]


def low_rank_for(matrix_NK: Tensor, rank: int, root: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """As `low_rank`, but nearest at the outputs, by a `Gram.root` (QERA, Zhang et al. 2024, arXiv 2410.06040)."""
    if root.ndim == 1:
        up, down = low_rank(matrix_NK * root, rank, generator)
        return up, down / root
    up, down = low_rank(matrix_NK @ root, rank, generator)
    return up, torch.linalg.solve_triangular(root, down, upper=False, left=False)


class Gram:
    """H = X^T X / M (K, K) of calibration rows X (M, K), as far as somebody asks for it."""

    def __init__(self, rows_MK: Tensor) -> None:
        count, columns = rows_MK.shape
        self.rows_MK = rows_MK / max(count, 1) ** 0.5
        self.whole = self.rows_MK.T @ self.rows_MK if count >= columns else None
        self.singular = False  # set where H has no Cholesky factor, however it is damped

    def diagonal(self) -> Tensor:
        """Each input's mean square (K,)."""
        return self.rows_MK.square().sum(0)

    def part(self, columns: Tensor) -> Tensor:
        """H between some inputs."""
        if self.whole is not None:
            return self.whole[columns][:, columns]
        rows = self.rows_MK[:, columns]
        return rows.T @ rows

    def root(self, damp: float = 0.01) -> Tensor:
        """R (K, K) or (K,) such that |E R|^2 is about the output error of E: triangular, or each input's size alone.

        The second where the rows are fewer than the inputs, or the inputs more than `SPAN`.
        """
        if self.whole is None or len(self.whole) > SPAN:
            return (self.diagonal() + damp * self.diagonal().mean() + 1e-12).sqrt()
        factor = damped_cholesky(self.whole, damp, 1e-12)
        if factor is None:
            self.singular = True
            return (self.diagonal() + damp * self.diagonal().mean() + 1e-12).sqrt()
        return factor.float()

    def error(self, error_NK: Tensor) -> float:
        """Mean squared error a row that a weight error causes at the output."""
        if self.whole is None:
            return float((error_NK @ self.rows_MK.T).square().sum())
        return float(((error_NK @ self.whole) * error_NK).sum())


def output_error(error_NK: Tensor, gram: Gram | None) -> float:
    """Mean squared error a row that a weight error causes at the output; without rows, that of white inputs."""
    return float(error_NK.square().sum()) if gram is None else gram.error(error_NK)


def damped_cholesky(hessian_KK: Tensor, damp: float, least: float, mean: float | None = None) -> Tensor | None:
    """The lower Cholesky factor of H in fp64, its diagonal raised by `damp` of its mean (or `mean`) and by `least`.

    Rounding of H in fp32 can leave it indefinite by more than that: the damping grows tenfold until there is a factor.

    Returns:
        The factor (K, K), or None where ten times the mean itself is not enough.
    """
    mean = float(hessian_KK.diagonal().double().mean()) if mean is None else mean
    while damp <= 10:
        raised = hessian_KK.to(torch.float64, copy=True)
        raised.diagonal().add_(damp * mean + least)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not int(failed) and bool(factor.isfinite().all()):
            return factor
        damp = max(10 * damp, 1e-6)
    return None


def error_feedback(
    weight_NK: Tensor,
    scales_NG: Tensor,
    bits: int,
    gram: Gram,
    *,
    damp: float = 0.01,
    block: int = 128,
    span: int = SPAN,
) -> Rounded:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one by one, most active first, and what each
    loses is made good by those to come within its span."""
    diagonal = gram.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    steps = scales_NG.float().repeat_interleave(GROUP, 1)[:, : len(order)]
    steps = torch.where(steps == 0, 1, steps)
    values = torch.empty_like(weight_NK, dtype=torch.int8)
    for columns in order.split(span):
        inverse = _inverse_factor(gram.part(columns), damp, float(diagonal.mean()))
        weight = weight_NK.float()[:, columns]
        if inverse is None:
            gram.singular = True
            return round_to_nearest(weight_NK, scales_NG, bits)
        values[:, columns] = _fed_back(weight, steps[:, columns], inverse, bits, block).to(torch.int8)
    return Rounded(values, scales_NG)


def _inverse_factor(hessian_CC: Tensor, damp: float, mean: float) -> Tensor | None:
    """The upper Cholesky factor of H's inverse in fp32: row c holds what column c's error asks of those after it.

    None where H is singular in spite of the damping.
    """
    factor_CC = damped_cholesky(hessian_CC, damp, 1e-8, mean)
    if factor_CC is None:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor_CC), upper=True)
    return None if int(failed) or not bool(upper.isfinite().all()) else upper.float()


def _fed_back(weight_NC: Tensor, steps_NC: Tensor, inverse_CC: Tensor, bits: int, block: int) -> Tensor:
    """Levels (N, C) of a span's columns; `weight` is used up."""
    values = torch.empty_like(weight_NC)
    for start in range(0, weight_NC.shape[1], block):
        stop = min(start + block, weight_NC.shape[1])
        errors = torch.zeros(weight_NC.shape[0], stop - start, device=weight_NC.device)
        for c in range(start, stop):
            values[:, c] = (weight_NC[:, c] / steps_NC[:, c]).round().clamp(-LEVELS[bits], LEVELS[bits])
            error = (weight_NC[:, c] - values[:, c] * steps_NC[:, c]) / inverse_CC[c, c]
            weight_NC[:, c:stop].addr_(error, inverse_CC[c, c:stop], alpha=-1)
            errors[:, c - start] = error
        weight_NC[:, stop:] -= errors @ inverse_CC[start:stop, stop:]
    return values


def rounded_inputs(x_MK: Tensor, bits: int, group: int = 0, unsigned: bool = False) -> Tensor:
    """Inputs as the kernels round them, back as floats: signed by absmax, unsigned up to 15 levels."""
    if bits == 16:
        return x_MK
    shape = x_MK.shape
    x = _groups(x_MK.reshape(-1, shape[-1])) if group else x_MK.reshape(-1, 1, shape[-1])
    levels = 15 if unsigned else LEVELS[bits]
    scale = x.abs().amax(-1, keepdim=True) / levels
    scale = torch.where(scale == 0, 1, scale)
    out = (x / scale).round_().clamp_(0 if unsigned else -levels, levels) * scale
    return out.flatten(1)[:, : shape[-1]].reshape(shape)
