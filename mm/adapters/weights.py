"""What entries make of a layer's weight: computed from the original through all of them, in order.

Legend: N outputs, K inputs, n changed rows of an embedding, D its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm.adapters.factors import whole_change
from mm.adapters.placed import Placed
from mm.layers import originals
from mm.layers.offloading import stored, write


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightChange:
    """A weight, or rows of an embedding, ready to be written, and what is kept as original from then on."""

    value: Tensor
    ids: Tensor | None = None
    original: Tensor | None = None
    original_ids: Tensor | None = None

    def write(self, module: nn.Module) -> None:
        if self.ids is None:
            write(module, "weight", self.value)
        else:
            weight = stored(module, "weight")
            assert weight is not None
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                weight[self.ids.to(weight.device)] = self.value.to(weight)
        if self.original is None:
            originals.forget(module)
        else:
            originals.keep(module, self.original, self.original_ids)


def weight_change(module: nn.Module, before: Sequence[Placed], after: Sequence[Placed]) -> WeightChange | None:
    """What has to be written; None where the entries that act in the weight stay the same."""
    old, new = ([p for p in ps if p.in_weight] for ps in (before, after))
    if [(p.entry, p.scale) for p in old] == [(p.entry, p.scale) for p in new]:
        return None
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(module, nn.Embedding):
            return row_change(module, new)
        original = originals.kept(module)
        if original is None:
            weight = stored(module, "weight")
            assert weight is not None
            original = weight.detach().clone()
        return WeightChange(value=folded(original, new), original=original if new else None)


def folded(weight_NK: Tensor, placed: Sequence[Placed]) -> Tensor:
    """A weight through entries in order, in fp32 at least, rounded once at the end."""
    if not placed:
        return weight_NK
    original = wide = weight_NK.detach().to(torch.promote_types(weight_NK.dtype, torch.float32))
    for p in placed:
        if p.entry.kind == "rotation":
            wide = rotated(wide, p)
        elif p.strength and p.entry.kind == "lowrank":  # at 0 even an infinite change is none
            down, up = (p.entry.tensors[name].to(wide) for name in ("down", "up"))
            wide = wide + p.strength * (up @ down)
        elif p.strength:
            wide = wide + p.strength * whole_change(p.entry, original)
    return wide.to(weight_NK.dtype)


def rotated(rows: Tensor, placed: Placed) -> Tensor:
    """R rows where the scale is 1, rows where it is 0, and in between (or beyond) the straight line through both."""
    if not placed.strength:
        return rows
    turned = placed.entry.tensors["rotation"].to(rows) @ rows
    return turned if placed.strength == 1.0 else rows + placed.strength * (turned - rows)


def row_change(module: nn.Embedding, placed: Sequence[Placed]) -> WeightChange:
    weight = stored(module, "weight")
    assert weight is not None
    old_ids = originals.kept_ids(module).cpu()
    new_ids = torch.cat([p.entry.tensors["ids"].cpu().long() for p in placed]).unique() if placed else old_ids[:0]
    ids = torch.cat([old_ids, new_ids]).unique()
    original_nD = weight.detach()[ids.to(weight.device)].clone()
    kept = originals.kept(module)
    if kept is not None:
        original_nD[torch.searchsorted(ids, old_ids)] = kept.to(original_nD)
    value_nD = original_nD.clone()
    for p in placed:
        spots = torch.searchsorted(ids, p.entry.tensors["ids"].cpu().long())
        rows = p.entry.tensors["rows"].to(value_nD)
        value_nD[spots] = rows if p.strength == 1.0 else value_nD[spots].lerp(rows, p.strength)
    stay = torch.searchsorted(ids, new_ids)
    return WeightChange(
        value=value_nD, ids=ids, original=original_nD[stay] if placed else None, original_ids=new_ids.to(weight.device)
    )
