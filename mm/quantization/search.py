"""One group of layers that share an input: smoothing factors, branch and integers.

Design choices
- The 39 candidates of SVDQuant: lambda = absmax(X)^a / absmax(W)^b with (a, b) = (0, 0), (t, 0), (t, 1 - t), t = 1/20
  to 19/20. Each is tried with rounded inputs, the rank-R branch and a residual rounded to nearest. All are scored at
  the layers' own outputs, many at once, since that costs no call of the model; the best quarter is scored where the
  group's parent module gives its output, on a quarter of the kept calls, and the best three of those on all of them.
- Calls of a parent cost time by their rows, all else by the weights: how many candidates it judges follows from what
  the calls cost (`Parent.affordable`), so that the time of the search stays proportional to the weights.
- Layers of a group are stacked: one lambda and one `down` serve q, k and v.
- Branch and rounding take turns, L = SVD(W' - Q), Q = round(W' - L), until a turn takes less than `WORTH` off the
  output error; then GPTQ rounds the residual, in turns with the branch as well, as long as that errs less. The branch
  is the best one at the outputs, not on the weights: GPTQ leaves most error where outputs do not depend on it.

Legend: C candidates, M rows, N outputs of all layers of the group, K inputs, R rank.
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
# Squared error at the parent's output of y = rounder(x) integers^T + x down^T up^T, on a share of the kept calls, from
# (integers' weight (N, K), branch's up (N, R) and down (R, K), rounder, share).
Score = Callable[[Tensor, Tensor, Tensor, Rounder, float], float]
QUARTER = 0.25  # of the calls score the short list
SHORT = (3, 10)  # candidates that are scored at the parent, by what its calls cost
FINALISTS = 3  # of those, on all calls, where that is affordable
TRIED_ON = 256  # rows on which all candidates are scored at the layers' own outputs
TOGETHER = 1 << 22  # weights of candidates that are tried at once
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
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The judge of candidates: the module that holds the group.

    Attributes:
        score: a candidate's error at its output.
        calls: kept calls of it.
        affordable: calls that all candidates together may cost.
    """

    score: Score
    calls: int
    affordable: int


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
        *more, rows, columns = weight.shape
        return weight.new_zeros(*more, rows, 0), weight.new_zeros(*more, 0, columns)
    return n.low_rank(weight, rank, generator) if root is None else n.low_rank_for(weight, rank, root, generator)


def search_smooth(
    weight_NK: Tensor, x_MK: Tensor, parent: Parent | None, rule: ActivationRule, config: SVDQuantConfig, bits: int
) -> Tensor:
    """The candidate lambda (K,) with the smallest error; `parent` None = at the layers' own outputs."""
    every = candidates(x_MK.abs().amax(0), weight_NK.abs().amax(0))
    factors_CK = torch.stack([found for _, _, found in every])
    own = own_errors(weight_NK, x_MK[:: max(1, len(x_MK) // TRIED_ON)], factors_CK, rule, config, bits)
    if parent is None:
        return factors_CK[int(own.argmin())]
    a_quarter = len(some(parent.calls, QUARTER))
    least, most = SHORT
    short = own.argsort(stable=True)[: max(least, min(most, 2 * parent.affordable // (3 * a_quarter)))].tolist()
    if 0 not in short:
        short.append(0)  # no smoothing at all

    def scored(k: int, share: float) -> float:
        dense_CNK, up_CNR, down_CRK = _tried(weight_NK, factors_CK[k : k + 1], config, bits)
        return parent.score(dense_CNK[0], up_CNR[0], down_CRK[0], _rounder(rule, factors_CK[k]), share)

    left = parent.affordable - len(short) * a_quarter
    finalists = sorted(short, key=lambda k: scored(k, QUARTER))[: max(1, min(FINALISTS, left // parent.calls))]
    if len(finalists) == 1:
        return factors_CK[finalists[0]]
    return factors_CK[min(finalists, key=lambda k: scored(k, 1.0))]


def some(of: int, share: float) -> list[int]:
    """A share of so many, at least two of them, evenly spread: calls come in the order of timesteps."""
    count = min(of, max(2, round(share * of)))
    return [int((i + 0.5) * of / count) for i in range(count)]


def own_errors(
    weight_NK: Tensor, x_MK: Tensor, factors_CK: Tensor, rule: ActivationRule, config: SVDQuantConfig, bits: int
) -> Tensor:
    """Squared errors (C,) of candidates at the layers' own outputs, inputs rounded."""
    wanted_MN = x_MK @ weight_NK.T
    errors: list[Tensor] = []
    for some_CK in factors_CK.split(max(1, TOGETHER // max(weight_NK.numel(), 1))):
        dense_CNK, up_CNR, down_CRK = _tried(weight_NK, some_CK, config, bits)
        rounded_CMK = torch.stack([_rounder(rule, factors_K)(x_MK) for factors_K in some_CK])
        got_CMN = torch.baddbmm(wanted_MN, rounded_CMK, dense_CNK.mT, beta=-1)
        if up_CNR.shape[-1]:
            got_CMN += (x_MK @ down_CRK.mT) @ up_CNR.mT
        errors.append(got_CMN.square_().sum((1, 2)))
    return torch.cat(errors)


def _tried(weight_NK: Tensor, factors_CK: Tensor, config: SVDQuantConfig, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each candidate's integers as weights (C, N, K), up (C, N, R) and down (C, R, K), smoothing undone."""
    scaled_CNK = weight_NK * factors_CK[:, None]
    up_CNR, down_CRK = _branch(scaled_CNK, config.rank, torch.Generator().manual_seed(config.seed))
    residual = scaled_CNK.sub_(up_CNR @ down_CRK) if config.rank else scaled_CNK
    flat = residual.flatten(0, 1)
    dense = n.round_to_nearest(flat, n.group_scales(flat, bits, torch.float32), bits).dense()
    return dense.view_as(residual).div_(factors_CK[:, None]), up_CNR, down_CRK / factors_CK[:, None]


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
    assert kept is not None, "weights and inputs are checked before"
    if config.gptq and gram is not None and not gram.singular:
        kept = _fed_back(scaled_NK, gram, root, kept, best, config, bits, dtype)
    return *kept, turns


def _fed_back(
    scaled_NK: Tensor,
    gram: n.Gram,
    root: Tensor | None,
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
    parent: Parent | None,
    *,
    after: str | None,
    config: SVDQuantConfig,
    bits: int,
    dtype: torch.dtype,
) -> Solution:
    """Everything for one group; weights and inputs in fp32.

    Args:
        weight_NK: of the stacked layers.
        x_MK: calibration rows; None = without data.
        parent: judges candidates at its output; None = the layers' own outputs do.
        after: the activation before the layers, where its outputs have a lower bound.
        config: settings, the rank already what this group gets.
        bits: of the weights.
        dtype: in which scales, factors and branch will be kept.
    """
    rule = rule_for(config, after)
    smooth = None
    if config.smooth and x_MK is not None:
        smooth = search_smooth(weight_NK, x_MK, parent, rule, config, bits).to(dtype).float()
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
        note=_note(gram, config),
    )


def _note(gram: n.Gram | None, config: SVDQuantConfig) -> str:
    if gram is None:
        return "" if config.data_free else "its input was never seen in calibration: quantized without data"
    return "its inputs' second moments are singular: no error feedback" if gram.singular and config.gptq else ""
