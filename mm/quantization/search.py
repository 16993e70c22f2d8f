"""One group of layers that share an input: smoothing factors, branch and integers.

Design choices
- The 39 candidates of SVDQuant: lambda = absmax(X)^a / absmax(W)^b with (a, b) = (0, 0), (t, 0), (t, 1 - t), t = 1/20
  to 19/20. Each is tried with rounded inputs, the rank-R branch and a residual rounded to nearest, and scored where the
  group's parent module gives its output; without a parent, at the layers' own outputs. All are scored on a quarter of
  what was seen, then the best quarter of them on all of it.
- Layers of a group are stacked: one lambda and one `down` serve q, k and v.
- Branch and rounding take turns, L = SVD(W' - Q), Q = round(W' - L), until a turn takes less than `WORTH` off the
  output error; then GPTQ rounds the residual, in turns with the branch as well, as long as that errs less. The branch
  is the best one at the outputs, not on the weights: what GPTQ leaves is largest where nothing is felt of it.

This module does not know where inputs come from, nor how layers are replaced.
Legend: M rows, N outputs of all layers of the group, K inputs, R rank.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm.layers.linear import ActivationRule
from mm.quantization import numerics as n
from mm.quantization.calibration import Group
from mm.quantization.config import SVDQuantConfig

Rounder = Callable[[Tensor], Tensor]
# (integers' weight (N, K), branch's up (N, R) and down (R, K), rounder, share of what was seen)
# -> squared error of y = rounder(x) integers^T + x down^T up^T.
Score = Callable[[Tensor, Tensor, Tensor, Rounder, float], float]
QUARTER = 0.25  # of the calls score all candidates; of the candidates are scored on all calls
WORTH = 1e-3
# A branch takes at most a 24th of a layer's smaller side: on a layer of 256 rank 32 would weigh as much as integers do.
RANK_SHARE = 24
FEEDBACKS = 2  # turns of GPTQ and branch: a third gained nothing
SHIFTS = {"gelu": 0.171875, "silu": 0.2734375}  # just above -min of the activation, exact in 16 bits


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What the stacked layers of a group become; `down` reads the raw input. Errors are shares of output power."""

    integers: n.Rounded
    smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None
    rule: ActivationRule
    nearest_error: float
    error: float
    branch_share: float
    turns: int


def branch_rank(rank: int, group: Group, layers: Sequence[nn.Linear]) -> int:
    """The rank that a group's branch gets where `rank` is asked for."""
    if group.first.precision == "weight_only":
        return 0
    return min(rank, min(min(layer.weight.shape) for layer in layers) // RANK_SHARE)


def candidates(x_peak_K: Tensor, w_peak_K: Tensor) -> list[tuple[float, float, Tensor]]:
    """The 39 (alpha, beta, lambda (K,))."""
    pairs = [(0.0, 0.0)]
    for i in range(1, 20):
        pairs += [(i / 20, 0.0), (i / 20, 1 - i / 20)]
    out = []
    for alpha, beta in pairs:
        factors = x_peak_K.clamp_min(1e-5) ** alpha / w_peak_K.clamp_min(1e-5) ** beta
        factors = torch.where((x_peak_K == 0) | (w_peak_K == 0) | ~factors.isfinite(), 1.0, factors)
        out.append((alpha, beta, factors))
    return out


def rule_for(config: SVDQuantConfig, after: str | None) -> ActivationRule:
    """How inputs are rounded: 4-bit ones in groups, and without a sign after an activation with a lower bound."""
    if config.activation_bits != 4:
        return ActivationRule(bits=config.activation_bits)
    if after:
        return ActivationRule(bits=4, group=n.GROUP, unsigned=True, shift=SHIFTS[after])
    return ActivationRule(bits=4, group=n.GROUP)


def rule_to_json(rule: ActivationRule) -> str:
    """One line."""
    return json.dumps(dataclasses.asdict(rule))


def rule_from_json(line: str) -> ActivationRule:
    """The reverse of `rule_to_json`."""
    return ActivationRule(**json.loads(line))


def _rounder(rule: ActivationRule, smooth: Tensor) -> Rounder:
    """Inputs as the layer sees them: shifted, smoothed, rounded, and back."""

    def run(x: Tensor) -> Tensor:
        if rule.bits == 16:
            return x
        rounded = n.rounded_inputs((x + rule.shift) / smooth, rule.bits, rule.group, rule.unsigned)
        return rounded * smooth - rule.shift

    return run


def _branch(weight: Tensor, rank: int, generator: torch.Generator, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """up and down."""
    if not rank:
        return weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1])
    return n.low_rank(weight, rank, generator) if root is None else n.low_rank_for(weight, rank, root, generator)


def search_smooth(
    weight_NK: Tensor, x_MK: Tensor, score: Score, rule: ActivationRule, config: SVDQuantConfig, bits: int
) -> Tensor:
    """The candidate lambda (K,) with the smallest score."""
    every = candidates(x_MK.abs().amax(0), weight_NK.abs().amax(0))
    factors = torch.stack([found for _, _, found in every])

    def scored(factors_K: Tensor, share: float) -> float:
        scaled = weight_NK * factors_K
        up, down = _branch(scaled, config.rank, torch.Generator().manual_seed(config.seed))
        residual = scaled.addmm_(up, down, alpha=-1)
        dense = n.round_to_nearest(residual, n.group_scales(residual, bits, torch.float32), bits).dense()
        return score(dense.div_(factors_K), up, down / factors_K, _rounder(rule, factors_K), share)

    first = torch.tensor([scored(each, QUARTER) for each in factors])
    finalists = first.argsort(stable=True)[: -(-len(every) // 4)]
    return factors[min(finalists.tolist(), key=lambda k: scored(factors[k], 1.0))]


def alternate(
    scaled_NK: Tensor, gram: n.Gram | None, config: SVDQuantConfig, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, n.Rounded, int]:
    """Branch and rounding in turns: up (N, R), down (R, K), the rounded residual, and how many turns it took."""
    importance, root = (None, None) if gram is None else (gram.diagonal(), gram.root())
    generator = torch.Generator().manual_seed(config.seed)
    rounded, best, kept = torch.zeros_like(scaled_NK), torch.inf, None
    turns = 0
    while turns < config.iterations:
        turns += 1
        up, down = _branch(scaled_NK - rounded, config.rank, generator, root)
        up, down = up.to(dtype).float(), down.to(dtype).float()
        residual = torch.addmm(scaled_NK, up, down, alpha=-1)
        integers = n.round_to_nearest(residual, n.group_scales(residual, bits, dtype, importance), bits)
        rounded = integers.dense()
        error = n.output_error(residual - rounded, gram)
        if error >= best:
            break
        small = error > (1 - WORTH) * best
        best, kept = error, (up, down, integers)
        if small or not config.rank:
            break
    assert kept is not None, "the weight is not finite"
    if config.gptq and gram is not None and root is not None:
        kept = _fed_back(scaled_NK, gram, root, kept, best, config, bits, dtype)
    return *kept, turns


def _fed_back(
    scaled_NK: Tensor,
    gram: n.Gram,
    root: Tensor,
    kept: tuple[Tensor, Tensor, n.Rounded],
    best: float,
    config: SVDQuantConfig,
    bits: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, n.Rounded]:
    """GPTQ and the branch in turns, from the solution `kept` that errs `best`; the one that errs least."""
    generator = torch.Generator().manual_seed(config.seed)
    up, down, integers = kept
    for turn in range(FEEDBACKS):
        residual = torch.addmm(scaled_NK, up, down, alpha=-1)
        scales = integers.scales if turn == 0 else n.group_scales(residual, bits, dtype, gram.diagonal())
        integers = n.error_feedback(residual, scales, bits, gram)
        error = n.output_error(residual - integers.dense(), gram)
        if error >= best:
            break
        best, kept = error, (up, down, integers)
        if not config.rank:
            break
        up, down = _branch(scaled_NK - integers.dense(), config.rank, generator, root)
        up, down = up.to(dtype).float(), down.to(dtype).float()
        error = n.output_error(scaled_NK - up @ down - integers.dense(), gram)
        if error < best:
            best, kept = error, (up, down, integers)
    return kept


def solve(
    weight_NK: Tensor,
    x_MK: Tensor | None,
    score: Score | None,
    *,
    after: str | None,
    config: SVDQuantConfig,
    bits: int,
    dtype: torch.dtype,
) -> Solution:
    """Everything for one group; `x` None = data-free. Weights and inputs in fp32."""
    rule = rule_for(config, after)
    smooth = None
    if config.smooth and x_MK is not None and score is not None:
        smooth = search_smooth(weight_NK, x_MK, score, rule, config, bits).to(dtype).float()
    factors = torch.ones(weight_NK.shape[1], device=weight_NK.device) if smooth is None else smooth
    # What the integers multiply: smoothed inputs as they are rounded.
    gram = None if x_MK is None else n.Gram(_rounder(rule, factors)(x_MK) / factors)
    up, down, integers, turns = alternate(weight_NK * factors, gram, config, bits, dtype)
    plain = n.round_to_nearest(weight_NK, n.group_scales(weight_NK, bits, dtype), bits).dense()
    raw = None if x_MK is None else n.Gram(x_MK)
    power = n.output_error(weight_NK, raw)
    acting = (integers.dense() + up @ down) / factors
    return Solution(
        integers=integers,
        smooth=smooth,
        down=down / factors if config.rank else None,
        up=up if config.rank else None,
        rule=rule,
        nearest_error=n.output_error(weight_NK - plain, raw) / max(power, 1e-30),
        error=n.output_error(weight_NK - acting, raw) / max(power, 1e-30),
        branch_share=n.output_error((up @ down) / factors, raw) / max(power, 1e-30),
        turns=turns,
    )
