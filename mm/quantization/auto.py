"""bits="auto": 4, 8 or 16 bits a group of layers, by measured error under a size budget.

Design choices
- What each choice errs is measured at the group's own outputs on calibration rows, as a share of their power: rounding
  of weights with the branch, at 4 and at 8 bits. Rounding of inputs is the same for both and left out.
- Greedy: all groups start at 4 bits, or at the bits of their `Site` where the budget allows that; the upgrade
  that takes away most error for its bytes is made while bytes are left. Errors are added up as if independent.

Smoothing and error feedback come afterwards, and help every choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from mm.quantization import calibration
from mm.quantization import numerics as n
from mm.quantization.calibration import Group
from mm.quantization.config import SVDQuantConfig
from mm.quantization.search import branch_rank

STEPS = (4, 8, 16)


def choose(
    root: nn.Module,
    groups: Sequence[Group],
    runs: Sequence[calibration.Run],
    sizes: calibration.Sizes,
    config: SVDQuantConfig,
) -> dict[str, int]:
    """Bits of every group."""
    errors: dict[str, dict[int, float]] = {}
    for batch in calibration.passes(root, groups, config, sizes.bytes):
        seen = calibration.watch(root, batch, runs, len(runs), sizes, config)
        for group in batch:
            errors[group.name] = _errors(root, group, seen[group.name].rows, config)
    bytes_of = {g.name: {b: _bytes(root, g, b, config) for b in STEPS} for g in groups}
    wanted = {g.name: g.first.bits for g in groups if g.first.bits}
    return allot(errors, bytes_of, config.size_budget or 1, wanted)


def allot(
    errors: dict[str, dict[int, float]],
    sizes: dict[str, dict[int, int]],
    budget: float,
    wanted: dict[str, int] | None = None,
) -> dict[str, int]:
    """The greedy choice: bits of every group so that the sizes stay within `budget` of those at 16 bits.

    `wanted` are bits to start some groups from, if all of them fit.
    """
    whole = budget * sum(size[16] for size in sizes.values())
    chosen = dict.fromkeys(errors, STEPS[0]) | (wanted or {})
    left = whole - sum(sizes[name][bits] for name, bits in chosen.items())
    if left < 0:
        chosen = dict.fromkeys(errors, STEPS[0])
        left = whole - sum(sizes[name][4] for name in errors)
    while True:
        best: tuple[float, str, int] | None = None
        for name, now in chosen.items():
            for bits in STEPS[STEPS.index(now) + 1 :]:
                cost = sizes[name][bits] - sizes[name][now]
                gain = (errors[name][now] - errors[name][bits]) / max(cost, 1)
                if cost <= left and gain > 0 and (best is None or gain > best[0]):
                    best = (gain, name, bits)
        if best is None:
            return chosen
        _, name, bits = best
        left -= sizes[name][bits] - sizes[name][chosen[name]]
        chosen[name] = bits


def _layers(root: nn.Module, group: Group) -> list[nn.Linear]:
    return [cast("nn.Linear", root.get_submodule(site.path)) for site in group.sites]


def _errors(root: nn.Module, group: Group, rows: torch.Tensor | None, config: SVDQuantConfig) -> dict[int, float]:
    layers = _layers(root, group)
    weight = torch.cat([layer.weight.float() for layer in layers])
    gram = None if rows is None else n.Gram(rows)
    power = max(n.output_error(weight, gram), 1e-30)
    rank = branch_rank(config.rank, group, layers)
    out = {16: 0.0}
    for bits in (4, 8):
        residual = weight
        if rank:
            up, down = n.low_rank(weight, rank, torch.Generator().manual_seed(config.seed))
            residual = weight - up @ down
        rounded = n.round_to_nearest(residual, n.group_scales(residual, bits, torch.float32), bits)
        out[bits] = n.output_error(residual - rounded.dense(), gram) / power
    return out


def _bytes(root: nn.Module, group: Group, bits: int, config: SVDQuantConfig) -> int:
    layers = _layers(root, group)
    rank = branch_rank(config.rank, group, layers)
    return sum(layer_bytes_at(layer, bits, rank) for layer in layers)


def layer_bytes_at(layer: nn.Linear, bits: int, rank: int) -> int:
    """Bytes of a layer's weight at some bits: integers, scales, branch and smoothing factors; floats at 16 bits."""
    outputs, inputs = layer.weight.shape
    if bits == 16:
        return 2 * outputs * inputs
    wide = -(-inputs // n.GROUP) * n.GROUP
    return outputs * wide * bits // 8 + 2 * outputs * wide // n.GROUP + 2 * rank * (outputs + inputs) + 2 * inputs
