"""What a candidate errs where the group's parent module gives its output: SVDQuant's measure of smoothing.

Design choices
- The parent runs again on kept calls, with the group's layers replaced for the moment by integers, branch and rounded
  inputs in fp32. Adapters that are attached as branches act there as well, since the kept outputs hold their part.
- Without a parent, or without kept calls, the error is that at the layers' own outputs.
- How many calls may be run follows from their rows: `ROWS` for each input, so that time grows with the weights.

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

ROWS = 64  # of the parent's calls, for each input of the layers, over all candidates
LEAST = 8  # calls that are affordable in any case


def linear(whole: nn.Module, path: str) -> nn.Linear:
    """The linear layer at `path`."""
    layer = whole.get_submodule(path)
    assert isinstance(layer, nn.Linear), path
    return layer


def judge(whole: nn.Module, group: Group, seen: Seen) -> search.Parent | None:
    """The group's parent as the judge of candidates; None where there is none, or no call of it was kept."""
    if seen.rows is None or not group.first.parent or not seen.calls:
        return None
    layers = [linear(whole, site.path) for site in group.sites]
    score = _at_parent(whole.get_submodule(group.first.parent), layers, seen)
    affordable = ROWS * layers[0].in_features // max(seen.rows_a_call, 1)
    return search.Parent(score=score, calls=len(seen.calls), affordable=max(LEAST, affordable))


def _at_parent(parent: nn.Module, layers: list[nn.Linear], seen: Seen) -> search.Score:
    sizes = [layer.out_features for layer in layers]

    def score(dense: Tensor, up: Tensor, down: Tensor, rounder: search.Rounder, share: float) -> float:
        parts = zip(layers, dense.split(sizes), up.split(sizes), strict=True)
        error = 0.0
        try:
            for layer, d, u in parts:
                layer.__dict__["forward"] = _stand_in(layer, d, u, down, rounder)  # in front of the class's own
            for k in search.some(len(seen.calls), share):
                args, kwargs, output = seen.calls[k]
                for got, want in zip(cal.tensors_of(parent(*args, **kwargs)), cal.tensors_of(output), strict=True):
                    error += float((got.float() - want.float()).square().sum())
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)
        return error

    return score


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
