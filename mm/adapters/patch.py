"""Patches: changes to a model that travel in one file, go on, scale, come off again, and say whether they fit.

Design choices
- Entries by module path (`mm.adapters.entry`). `lowrank` is a branch (optionally for text or picture tokens only),
  `rows` are embedding rows. These two go onto 16-bit and 4-bit layers as they are; the kinds that change whole weights
  (dense, in factors, rotations) change 16-bit weights, and onto a 4-bit layer they go only `truncated` to a rank.
- Applying says "N of N tensors" or raises with the first names that do not match; nothing is applied in part.
- A file carries the hash of the base it was made for, by its 16-bit tensors; a quantized model keeps that hash. Another
  base, or a foreign adapter without one, warns.
- A patch holds no state of any model: what is applied, and how it comes off, is the model's stack
  (`mm.adapters.stack`). The same patch goes onto several models, and one read again from its file takes it off.

Legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry as Entry
from mm.adapters.factors import OF_WEIGHT, WHOLE, base_weight, factors_misfit, shape_misfit, whole_change
from mm.adapters.patch_file import FIELDS, read_patch, write_patch
from mm.adapters.stack import Applied as Applied
from mm.adapters.stack import Stack, stack_of
from mm.adapters.tokens import placed_rows, release_words
from mm.core.checks import check_path, whole
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.families.family import resolve
from mm.layers.linear import BranchedLinear
from mm.layers.offloading import stored
from mm.layers.surgery import locate, no_branches, roots_of, submodule

MAX_RANK = 10**6


@dataclass(kw_only=True)
class Patch:
    """Entries by path; paths of pipelines begin with the component's name."""

    entries: dict[str, Entry]
    method: str = "lora"
    base: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    name: str = "patch"

    # ---- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all. A file that is there is replaced.

        Args:
            path: the file; its folder is made where it is missing.

        Raises:
            UserError: where the path is a folder, or lies in a file.
        """
        check_path("the patch's file", path)
        write_patch(path, self.entries, {name: getattr(self, name) for name in FIELDS})

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Reads a file that `save` wrote.

        Raises:
            UserError: for any other file, and for one whose values are not those that were written.
        """
        check_path("the patch's file", path)
        entries, fields = read_patch(path)
        return cls(entries=entries, **fields)

    # ---- on and off ---------------------------------------------------------------------------------------------

    def apply(self, target: Any, scale: float = 1.0, *, force: bool = False) -> Applied:
        """Puts all entries onto a module or pipeline, on top of what is there.

        Args:
            target: a module or pipeline.
            scale: how strongly: 0 is without the patch, 1 in full.
            force: whether a patch that was baked into the weights is applied once more.

        Raises:
            UserError: when an entry misfits, a patch of this name is there already, or the patch was baked into the
                weights; nothing is changed then.
        """
        stack = stack_of(target)
        try:
            return stack.apply(self._on_rows(target, add=True), scale, force=force)
        except BaseException:
            release_words(target)
            raise

    def scale(self, target: Any, scale: float) -> None:
        """How strongly the patch acts from now on: 0 is without it, 1 in full."""
        self._on(target).scale(self.name, scale)

    def undo(self, target: Any) -> None:
        """Takes the patch off; the model is then, bit for bit, what it would be without it."""
        self._on(target).undo(self.name)

    def bake(self, target: Any, scale: float | None = None, *, force: bool = False) -> Applied:
        """Adds the patch to 16-bit weights for good, for example before quantizing.

        The model keeps a record of it, also in folders that `save_pretrained` writes, so that the patch is not applied
        a second time by mistake.

        Args:
            target: a module or pipeline, with the patch on it or not.
            scale: how strongly; by default as it acts now, or in full where it is not applied.
            force: whether a patch that was baked into the weights is added once more.

        Raises:
            UserError: where that is not possible, or the patch was baked already; nothing is changed then.
        """
        stack = stack_of(target)
        item = next((item for item in stack.list() if item.name == self.name), None)
        if item is None:
            self.apply(target, 1.0 if scale is None else scale, force=force)
        else:
            self._on(target)
            if scale is not None:
                stack.scale(self.name, scale)
        try:
            return stack.bake(self.name)
        except BaseException:
            if item is None:
                stack.undo(self.name)
            else:
                stack.scale(self.name, item.scale)
            raise

    def verify(self, target: Any, **measure: Any) -> Any:
        """Says "N of N tensors applied" when the model carries the patch; raises UserError where it does not.

        With `judge=...` and further arguments of `mm.erasure.certify.verify` an erasure is measured instead,
        whether it is applied or not. Its `Certificate` is returned and written into the report. The model stays as it
        was.
        """
        if measure:
            return resolve("mm.erasure.certify:verify")(self, target, **measure)
        return stack_of(target).verify(self.name, self._on_rows(target).entries)

    def _on(self, target: Any) -> Stack:
        """The stack, with this very patch on it."""
        stack = stack_of(target)
        stack.require(self.name, self._on_rows(target).entries)
        return stack

    def _on_rows(self, target: Any, *, add: bool = False) -> Patch:
        """The patch with the rows that its words have on a model; `add` adds the words to its tokenizers."""
        if not self.settings.get("tokens"):
            return self
        return dataclasses.replace(self, entries=placed_rows(self.entries, self.settings, target, add=add))

    def expanded(self, target: Any) -> Patch:
        """The patch with DoRA and OFT entries, whose change depends on the weights, as dense ones of this model.

        Args:
            target: the model or pipeline.

        Raises:
            UserError: where a layer is missing or does not fit.
        """
        found = {path: _whole(entry, path, target) for path, entry in self.entries.items() if entry.kind in OF_WEIGHT}
        made = {
            path: dataclasses.replace(self.entries[path], kind="dense", tensors={"delta": delta})
            for path, delta in found.items()
        }
        return dataclasses.replace(self, entries=self.entries | made) if made else self

    def truncated(self, rank: int, target: Any = None) -> Patch:
        """Changes of whole weights as low-rank ones of at most `rank`; what is lost is in the report and printed.

        Args:
            rank: of the new entries. A LoHa of rank r is, exactly, of rank r^2 at most.
            target: the model, which rotations need: (R - I) W is a change of its weights as they are now, branches
                included; and DoRA and OFT, whose change is one of the weights before any patch. 4-bit layers give what
                they compute with.

        Raises:
            UserError: where a target is needed and there is none.
        """
        whole("rank", rank, 1, MAX_RANK)
        entries, lost = dict(self.entries), {}
        for path, entry in self.entries.items():
            if entry.kind in (*WHOLE, "rotation"):
                entries[path], lost[path] = _truncate(entry, rank, path, target)
        if lost:
            worst = max(lost, key=lambda p: lost[p])
            kinds = " and ".join(sorted({"dense" if self.entries[p].kind in WHOLE else "rotation" for p in lost}))
            print(f"truncated {len(lost)} {kinds} entries to rank {rank}; at most {lost[worst]:.1%} lost ({worst})")
        return dataclasses.replace(self, entries=entries, report=self.report | {"truncated": lost})


def _truncate(entry: Entry, rank: int, path: str, target: Any) -> tuple[Entry, float]:
    """The best low-rank entry for another one, and the share of the change's norm that is lost (Eckart-Young)."""
    delta_NK = _rotation_change(entry, path, target) if entry.kind == "rotation" else _whole(entry, path, target)
    left, sizes, right = torch.linalg.svd(delta_NK, full_matrices=False)
    root = sizes[:rank].sqrt()
    made = {"up": left[:, :rank] * (entry.scale * root), "down": root[:, None] * right[:rank]}
    lost = float(sizes[rank:].norm() / sizes.norm().clamp_min(1e-30))
    return dataclasses.replace(entry, kind="lowrank", tensors=made, scale=1.0), lost


def _whole(entry: Entry, path: str, target: Any) -> Tensor:
    """The change that an entry of a kind in `WHOLE` stands for, in fp32."""
    if entry.kind not in OF_WEIGHT:
        return whole_change(entry).float()
    layer = _linear(path, target, f"{path} is a change ({entry.kind}) that depends on the model's weights")
    weight_NK = base_weight(layer, path).float()
    if why := factors_misfit(entry) or shape_misfit(entry, tuple(weight_NK.shape)):
        raise UserError(f"{path} does not fit this model: {why}")
    return whole_change(entry, weight_NK).cpu()


def _linear(path: str, target: Any, what: str) -> nn.Linear:
    """The linear layer at a path. Raises UserError where there is no model, or no such layer in it."""
    if target is None:
        raise UserError(f"{what}; give the model too: truncated(rank, model)")
    spot = locate(roots_of(target), path)
    layer = None if spot is None else submodule(*spot)
    why = "no such layer" if layer is None else no_branches(layer)
    if layer is None or why:
        raise UserError(f"{path} does not fit this model: {why}")
    assert isinstance(layer, nn.Linear)
    return layer


def _rotation_change(entry: Entry, path: str, target: Any) -> Tensor:
    """(R - I) W, W what the layer does now."""
    layer = _linear(path, target, f"{path} is a rotation of the model's weights")
    weight = layer.effective_weight() if isinstance(layer, BranchedLinear) else stored(layer, "weight")
    assert weight is not None
    weight_NK = weight.detach().float()
    rotation_NN = entry.tensors["rotation"].to(weight_NK)
    if rotation_NN.shape != (len(weight_NK), len(weight_NK)):
        raise UserError(
            f"the rotation of {path} is {tuple(rotation_NN.shape)}, the layer has {counted(len(weight_NK), 'output')}"
        )
    return (rotation_NN @ weight_NK - weight_NK).cpu()
