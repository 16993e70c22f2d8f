"""What is on a model's stack, as reports and as spots: an entry on a layer (`mm.adapters.stack`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm.adapters.entry import Entry
from mm.adapters.layer_state import placed_on
from mm.adapters.matching import layer_path
from mm.adapters.placed import Placed
from mm.core.nouns import counted
from mm.layers.base_hash import base_hash
from mm.layers.surgery import roots_of

if TYPE_CHECKING:
    from mm.adapters.patch import Patch


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What was done; `str` says it."""

    tensors: int
    layers: int

    def __str__(self) -> str:
        return f"{self.tensors} of {counted(self.tensors, 'tensor')} applied to {counted(self.layers, 'layer')}"


@dataclass(frozen=True, kw_only=True)
class StackItem:
    """One patch on a model.

    Attributes:
        name: of the patch.
        method: that made it.
        word: what its subject is called in prompts; "" where it does not say.
        scale: how strongly it acts.
        layers: how many it changes.
        tensors: how many it has.
        base_matches: whether the model is the one it was made for; None where the patch does not say.
        kinds: of its entries.
        fused: its low-rank entries act in the weights.
        erases: the concepts that it erases; empty for other patches.
    """

    name: str
    method: str
    word: str
    scale: float
    layers: int
    tensors: int
    base_matches: bool | None
    kinds: tuple[str, ...]
    fused: bool
    erases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Spot:
    """One entry on one layer, as found in a model.

    Attributes:
        path: of the layer from the target, with ".bias" where its bias is meant.
        module: the layer.
        placed: the entry as it was put there.
    """

    path: str
    module: nn.Module
    placed: Placed

    @property
    def key(self) -> tuple[int, bool]:
        """The layer, and whether its bias is meant."""
        return id(self.module), self.placed.in_bias


def item_of(placed: Sequence[Placed]) -> StackItem:
    """The report of a patch, from all that it has put on a model."""
    first = placed[0]
    return StackItem(
        name=first.name,
        method=first.method,
        word=first.word,
        scale=first.scale,
        layers=len({layer_path(p.path, p.entry) for p in placed}),
        tensors=sum(len(p.entry.tensors) for p in placed),
        base_matches=first.base_matches,
        kinds=tuple(sorted({p.entry.kind for p in placed})),
        fused=any(p.fused for p in placed),
        erases=first.erases,
    )


def targets_of(patch: Patch) -> tuple[str, ...]:
    """The concepts that a patch erases, as its maker reports them; empty for other patches."""
    found = patch.report.get("targets")
    return tuple(str(name) for name in found) if isinstance(found, list | tuple) else ()


def same_entry(one: Entry, other: Entry) -> bool:
    """Whether two entries are the same change, bit for bit, on whatever devices."""
    if one is other:
        return True
    return (one.kind, one.scope, one.scale, set(one.tensors)) == (
        other.kind,
        other.scope,
        other.scale,
        set(other.tensors),
    ) and all(torch.equal(one.tensors[k].cpu(), other.tensors[k].cpu()) for k in one.tensors)


def in_the_way(spot: Spot) -> str:
    """The name of a patch below that does not commute with this one; empty where there is none."""
    stack = placed_on(spot.module)
    below = stack[: stack.index(spot.placed)]
    mine = spot.placed.entry
    for other in below:
        if "bias" in (mine.kind, other.entry.kind):
            continue
        if "rotation" in (mine.kind, other.entry.kind):
            return other.name
        if mine.kind == "rows" and torch.isin(mine.tensors["ids"].cpu(), other.entry.tensors["ids"].cpu()).any():
            return other.name
    return ""


def base_matches_of(patch: Patch, target: Any) -> bool | None:
    """Whether a patch was made for this model; None where it does not say. Warns unless it was."""
    if not patch.base:
        warnings.warn(
            f"patch {patch.name!r} does not say which model it was made for; shapes fit, more is not known",
            stacklevel=4,
        )
        return None
    hashes = [base_hash(root) for root in roots_of(target).values()]
    if patch.base not in hashes:
        warnings.warn(
            f"patch {patch.name!r} was made for another base ({patch.base[:12]}..., this is {hashes[0][:12]}...)",
            stacklevel=4,
        )
    return patch.base in hashes
