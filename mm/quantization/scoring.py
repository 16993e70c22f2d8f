"""What a candidate errs where the group's parent module gives its output: SVDQuant's measure of smoothing.

Design choices
- The parent runs again on kept calls, with the group's layers replaced for the moment by integers, branch and rounded
  inputs in fp32. Adapters that are attached as branches act there as well, since the kept outputs hold their part.
- Without a parent, or without kept calls, the error is that at the layers' own outputs.
- Of large inputs only as many calls are run as give `TOKENS` rows for each input: more tell nothing new of the weights,
  and their time would grow with the picture instead of the weights.

Legend: M rows, N outputs of all layers of the group, K inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mm.layers.linear import BranchedLinear
from mm.quantization import calibration as cal
from mm.quantization import search
from mm.quantization.calibration import Group, Seen

SCORED = 1024  # rows by which candidates are told apart; rounding takes all of them


def linear(whole: nn.Module, path: str) -> nn.Linear:
    """The linear layer at `path`."""
    layer = whole.get_submodule(path)
    assert isinstance(layer, nn.Linear), path
    return layer


def scorer(whole: nn.Module, group: Group, seen: Seen) -> search.Score | None:
    """The squared error of a candidate for a group; None where nothing was seen of its input."""
    if seen.rows is None:
        return None
    layers = [linear(whole, site.path) for site in group.sites]
    if not group.first.parent or not seen.calls:
        return None
    return _at_parent(whole.get_submodule(group.first.parent), layers, seen)


def _at_parent(parent: nn.Module, layers: list[nn.Linear], seen: Seen) -> search.Score:
    sizes = [layer.out_features for layer in layers]

    def score(dense: Tensor, up: Tensor, down: Tensor, rounder: search.Rounder, share: float) -> float:
        parts = zip(layers, dense.split(sizes), up.split(sizes), strict=True)
        error = 0.0
        try:
            for layer, d, u in parts:
                layer.__dict__["forward"] = _stand_in(layer, d, u, down, rounder)  # in front of the class's own
            for k in some(len(seen.calls), share):
                args, kwargs, output = seen.calls[k]
                for got, want in zip(cal.tensors_of(parent(*args, **kwargs)), cal.tensors_of(output), strict=True):
                    error += float((got.float() - want.float()).square().sum())
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)
        return error

    return score


def some(of: int, share: float) -> list[int]:
    """A share of so many, at least two of them, evenly spread: rows and calls come in the order of timesteps."""
    count = min(of, max(2, round(share * of)))
    return [int((i + 0.5) * of / count) for i in range(count)]


def _stand_in(
    layer: nn.Linear, dense: Tensor, up: Tensor, down: Tensor, rounder: search.Rounder
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        y = F.linear(rounder(wide), dense, None if layer.bias is None else layer.bias.float())
        if len(down):
            y = y + (wide @ down.T) @ up.T
        return _with_adapters(layer, y, wide).to(x.dtype)

    return forward


def _with_adapters(layer: nn.Linear, y: Tensor, x: Tensor) -> Tensor:
    if not isinstance(layer, BranchedLinear) or not layer.branches:
        return y
    for branch in layer.branches:
        if branch.scope is None:
            y = y + branch.scale * F.linear(F.linear(x, branch.down.to(x)), branch.up.to(x))
    return layer._scoped(y, x)
