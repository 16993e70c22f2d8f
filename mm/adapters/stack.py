"""The stack of a model: all patches, LoRAs and erasures on it, in one order; any of them comes off again.

Design choices
- The stack is a view: what is applied is kept by each layer (`mm.adapters.layer_state`). Two pipelines that share a
  part share its stack, a copied model has a copy of it, and a patch that was read twice from a file is the same patch.
- A name stands for one patch on a model. Applying a second one of a name raises before anything is changed.
- Every call changes all its layers or, where something fails midway, none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from mm.adapters.baked import erased_from, is_baked, record, refuse_baked
from mm.adapters.entry import Entry
from mm.adapters.layer_state import acts, arrange, placed_on, rescale, settle
from mm.adapters.matching import Place, layer_path, match
from mm.adapters.placed import Placed
from mm.adapters.stack_items import (
    Applied,
    Spot,
    StackItem,
    base_matches_of,
    in_the_way,
    item_of,
    same_entry,
    targets_of,
)
from mm.adapters.tokens import keep_words, release_words
from mm.core.checks import number
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.layers.linear import BranchedLinear
from mm.layers.offloading import check_groups, refresh_groups
from mm.layers.surgery import clean, roots_of

MAX_SCALE = 1e6  # of a patch, on either side of 0

if TYPE_CHECKING:
    from mm.adapters.patch import Patch


def stack_of(target: Any) -> Stack:
    """The stack of a module or pipeline."""
    return Stack(target)


class Stack:
    """All patches on a module or pipeline, in the order of applying."""

    def __init__(self, target: Any) -> None:
        roots_of(target)  # raises for what is no model
        self.target = target

    # ---- what is there ----------------------------------------------------------------------------------------------

    def list(self) -> tuple[StackItem, ...]:
        """The patches in order."""
        by_name: dict[str, list[Placed]] = {}
        for spot in sorted(self._spots(), key=lambda s: s.placed.order):
            by_name.setdefault(spot.placed.name, []).append(spot.placed)
        return tuple(item_of(placed) for placed in by_name.values())

    def names(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(item.name for item in self.list())

    def erased(self) -> tuple[str, ...]:
        """The concepts that the model was erased of, by patches that act now or were baked into its weights."""
        acting = [name for item in self.list() if item.scale for name in item.erases]
        baked = [name for root in roots_of(self.target).values() for name in erased_from(root)]
        return tuple(dict.fromkeys((*baked, *acting)))

    def overlap(self, first: str, second: str) -> tuple[str, ...]:
        """Paths of the layers that two patches both change; empty where they share none."""
        mine, theirs = ({layer_path(s.path, s.placed.entry) for s in self._named(name)} for name in (first, second))
        return tuple(sorted(mine & theirs))

    def verify(self, name: str, entries: dict[str, Entry] | None = None) -> str:
        """Checks that a patch is on the model, in full and as it was put there; changes nothing.

        Args:
            name: of the patch.
            entries: its entries by path, compared with those that are on the model; None: those are not compared.

        Returns:
            "N of N tensors applied".

        Raises:
            UserError: with the first layer that lacks it, or whose tensors were changed since.
        """
        spots = self._named(name) if entries is None else self._of(name, entries)
        for spot in spots:
            if not acts(spot.module, spot.placed):
                raise UserError(
                    f"{spot.path} no longer has what patch {name!r} put there; something else changed the layer"
                )
        total = sum(len(spot.placed.entry.tensors) for spot in spots)
        return f"{total} of {counted(total, 'tensor')} applied"

    def require(self, name: str, entries: dict[str, Entry]) -> None:
        """Raises UserError unless these very entries are on the model under that name."""
        self._of(name, entries)

    # ---- changes ----------------------------------------------------------------------------------------------------

    def apply(self, patch: Patch, scale: float = 1.0, *, force: bool = False) -> Applied:
        """Puts a patch on top.

        Args:
            patch: what to apply.
            scale: how strongly: 0 is without it, 1 in full.
            force: whether a patch that is baked into the weights already is applied once more.

        Raises:
            UserError: where an entry does not fit, the name is taken, or the patch is baked into the weights already;
                nothing is changed then.
        """
        if not patch.name:
            raise UserError("the patch has no name; give it one, by which it is taken off again")
        number("scale", scale, -MAX_SCALE, MAX_SCALE)
        places = match(patch.name, patch.entries, self.target)
        self._check_free(patch.name, places)
        if not force:
            changes = [(place.module, place.entry) for place in places]
            refuse_baked(patch.name, patch.base, roots_of(self.target).values(), changes)
        base = base_matches_of(patch, self.target)
        order = 1 + max((spot.placed.order for spot in self._spots()), default=0)
        common: dict[str, Any] = {"name": patch.name, "scale": float(scale), "order": order, "method": patch.method}
        common |= {"word": str(patch.settings.get("name") or ""), "erases": targets_of(patch)}

        def put(module: nn.Module, place: Place) -> None:
            made = Placed(entry=place.entry, path=place.path, base_matches=base, **common)
            arrange(module, [*placed_on(module), made])

        self._all([(place.module, place) for place in places], put)
        return Applied(
            tensors=sum(len(e.tensors) for e in patch.entries.values()),
            layers=len({id(place.module) for place in places}),
        )

    def scale(self, name: str, scale: float) -> None:
        """How strongly a patch acts from now on: 0 is without it, 1 in full. Entries of all kinds follow."""
        number("scale", scale, -MAX_SCALE, MAX_SCALE)
        spots = [spot for spot in self._named(name) if spot.placed.scale != scale]
        self._all([(spot.module, None) for spot in spots], lambda module, _: rescale(module, name, float(scale)))

    def undo(self, name: str) -> None:
        """Takes a patch off, and its words; the model is then, bit for bit, what it would be without it."""

        def take(module: nn.Module, _: None) -> None:
            arrange(module, [p for p in placed_on(module) if p.name != name])

        self._all([(spot.module, None) for spot in self._named(name)], take)
        release_words(self.target)

    def clear(self) -> None:
        """Takes all patches off, the last one first."""
        for name in reversed(self.names()):
            self.undo(name)

    def fuse(self, *names: str) -> None:
        """Lets low-rank entries act in the 16-bit weights instead of beside them; `unfuse` reverses it exactly.

        Raises:
            UserError: where a layer has quantized weights or an entry is for some tokens only; nothing is changed then.
        """
        for name in names:
            self._check_weights(name)
        self._fused(names, True)

    def unfuse(self, *names: str) -> None:
        """Lets low-rank entries act as branches again."""
        self._fused(names, False)

    def bake(self, name: str) -> Applied:
        """Makes a patch part of the 16-bit weights for good; it is no longer on the stack afterwards.

        Raises:
            UserError: where a layer has quantized weights, an entry is for some tokens only, or a patch below it would
                then act on something else; nothing is changed then.
        """
        self._check_weights(name)
        spots = self._named(name)
        for spot in spots:
            if below := in_the_way(spot):
                raise UserError(f"{spot.path}: {name!r} acts on what {below!r} gives there; bake {below!r} first")
        changes = [(spot.module, spot.placed.entry) for spot in spots]
        if any(spot.placed.is_branch for spot in spots):
            self._fused((name,), True)
        for module in {id(spot.module): spot.module for spot in spots}.values():
            settle(module, name)
        record(roots_of(self.target).values(), changes, spots[0].placed.erases)
        keep_words(self.target, {spot.path: spot.placed.entry for spot in spots})
        return Applied(
            tensors=sum(len(s.placed.entry.tensors) for s in spots), layers=len({id(spot.module) for spot in spots})
        )

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _spots(self) -> Iterator[Spot]:
        for component, root in roots_of(self.target).items():
            for path, module in root.named_modules():
                for placed in placed_on(module):
                    end = ".bias" if placed.in_bias else ""
                    yield Spot(path=f"{component}.{clean(path)}{end}".strip("."), module=module, placed=placed)

    def _named(self, name: str) -> Sequence[Spot]:
        found = [spot for spot in self._spots() if spot.placed.name == name]
        if not found:
            raise UserError(f"no patch {name!r} is applied; applied: {', '.join(self.names()) or 'none'}")
        return found

    def _of(self, name: str, entries: dict[str, Entry]) -> Sequence[Spot]:
        """Where a patch's own entries are. Raises UserError where some are missing or others of that name are there."""
        places = match(name, entries, self.target)
        spots = {spot.key: spot for spot in self._spots() if spot.placed.name == name}
        missing = [place.path for place in places if place.key not in spots]
        if missing:
            baked = is_baked(roots_of(self.target).values(), [(place.module, place.entry) for place in places])
            why = "it is baked into the weights, which nothing takes out again" if baked else "apply it first"
            if len(missing) < len(places):
                why = "other calls took it off there; undo it by its name, with mm.adapters.stack_of"
            raise UserError(
                f"{len(missing)} of {counted(len(places), 'layer')} lack patch {name!r}: {missing[0]} first; {why}"
            )
        for place in places:
            if not same_entry(place.entry, spots[place.key].placed.entry):
                raise UserError(f"another patch named {name!r} is applied to {place.path}; its tensors are others")
        if len(spots) != len(places):
            raise UserError(
                f"another patch named {name!r} is applied: to {counted(len(spots), 'layer')}, not {len(places)}"
            )
        return [spots[place.key] for place in places]

    def _check_free(self, name: str, places: Sequence[Place]) -> None:
        taken = any(spot.placed.name == name for spot in self._spots())
        if taken or any(name in [b.name for b in getattr(place.module, "branches", ())] for place in places):
            raise UserError(f"a patch {name!r} is applied already; undo it, or give this one another name")

    def _check_weights(self, name: str) -> None:
        for spot in self._named(name):
            if isinstance(spot.module, BranchedLinear) and spot.module.bits != 16 and not spot.placed.in_bias:
                raise UserError(
                    f"{spot.path} has {spot.module.bits}-bit weights, which take no fusing; the patch runs beside "
                    "them. To make it part of the weights, bake it into the 16-bit model and quantize that"
                )
            if spot.placed.entry.scope:
                raise UserError(
                    f"{spot.path}: a branch for {spot.placed.entry.scope} tokens only is no part of one weight"
                )

    def _fused(self, names: Sequence[str], fused: bool) -> None:
        def switch(module: nn.Module, _: None) -> None:
            arrange(
                module,
                [
                    replace(p, fused=fused) if p.name in names and p.entry.kind == "lowrank" else p
                    for p in placed_on(module)
                ],
            )

        low = [s for name in names for s in self._named(name) if s.placed.entry.kind == "lowrank"]
        layers = {id(spot.module): spot.module for spot in low if spot.placed.fused != fused}
        self._all([(module, None) for module in layers.values()], switch)

    def _all(self, work: Sequence[tuple[nn.Module, Any]], change: Callable[[nn.Module, Any], None]) -> None:
        """Changes all layers; where one fails, those changed before it are put back."""
        for root in roots_of(self.target).values():
            if work:
                check_groups(root)
        before = []
        try:
            for module, what in work:
                before.append((module, placed_on(module), getattr(module, "branches", ())))
                change(module, what)
        except BaseException:
            for module, placed, branches in reversed(before):
                arrange(module, placed)
                if branches and isinstance(module, BranchedLinear):
                    module.arrange(branches)
            raise
        for root in roots_of(self.target).values():
            refresh_groups(root)
