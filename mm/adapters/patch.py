"""Patches: changes to a model that travel in one file, go on, scale, come off again, and say whether they fit.

Design choices
- Entries by module path. `lowrank` is a branch (optionally for text or picture tokens only), `rows` are embedding rows,
  `dense` is a change of a whole weight, `rotation` multiplies a weight's outputs. The first two go onto 16-bit and
  4-bit layers as they are; the other two change 16-bit weights, and onto a 4-bit layer only `truncated` to a rank.
- Applying says "N of N tensors" or raises with the first names that do not match; nothing is applied in part.
- A file carries the hash of the base it was made for, by its 16-bit tensors; a quantized model keeps that hash. Another
  base, or a foreign adapter without one, warns.
- Undo restores what was there bit for bit: branches are detached, rows and weights are kept and put back.

This module does not know how patches are made, nor foreign formats (`mm.adapters.lora_formats`).
Legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry as Entry
from mm.adapters.patch_file import FIELDS, read_patch, write_patch
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash
from mm.layers.linear import Branch, BranchedLinear
from mm.layers.surgery import branched, locate, roots_of


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What was done; `str` says it."""

    tensors: int
    layers: int

    def __str__(self) -> str:
        return f"{self.tensors} of {self.tensors} tensors applied to {self.layers} layers"


@dataclass(kw_only=True)
class Patch:
    """Entries by path; paths of pipelines begin with the component's name."""

    entries: dict[str, Entry]
    method: str = "lora"
    base: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    name: str = "patch"
    _kept: list[tuple[Any, Tensor]] = field(default_factory=list, repr=False)

    # ---- files --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        write_patch(path, self.entries, {name: getattr(self, name) for name in FIELDS})

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Reads a file that `save` wrote. Raises UserError for anything else."""
        entries, fields = read_patch(path)
        return cls(entries=entries, **fields)

    # ---- on and off ---------------------------------------------------------------------------------------------

    def apply(self, target: Any, scale: float = 1.0) -> Applied:
        """Puts all entries onto a module or pipeline. Raises UserError when one misfits; nothing is changed then."""
        places = self._match(target)
        self._check_base(target)
        for entry, root, path in places:
            self._put(entry, root, path, scale)
        return Applied(tensors=sum(len(e.tensors) for e in self.entries.values()), layers=len(places))

    def scale(self, target: Any, scale: float) -> None:
        """How strongly the patch acts from now on; low-rank entries only."""
        for entry, root, path in self._match(target):
            if entry.kind != "lowrank":
                raise UserError(
                    f"{path}: an entry of kind {entry.kind!r} has no live scale; undo it and apply it again"
                )
            branched(root, path).set_scale(self.name, scale * entry.scale)

    def undo(self, target: Any) -> None:
        """Takes the patch off; the model is then what it was, bit for bit."""
        for entry, root, path in self._match(target):
            if entry.kind == "lowrank":
                branched(root, path).detach(self.name)
        with torch.no_grad():
            while self._kept:
                module, before = self._kept.pop()
                module.weight.copy_(before)

    def bake(self, target: Any, scale: float = 1.0) -> Applied:
        """Adds the patch to 16-bit weights for good, for example before quantizing."""
        places = self._match(target)
        for entry, root, path in places:
            layer: Any = root.get_submodule(path)
            if isinstance(layer, BranchedLinear) and layer.bits != 16:
                raise UserError(f"{path} has {layer.bits}-bit weights; bake into the 16-bit model and quantize that")
            if entry.scope:
                raise UserError(f"{path}: a branch for {entry.scope} tokens only cannot be baked into one weight")
            with torch.no_grad():
                layer.weight.copy_(_changed(entry, layer.weight, scale))
        return Applied(tensors=sum(len(e.tensors) for e in self.entries.values()), layers=len(places))

    def verify(self, target: Any) -> str:
        """Says "N of N tensors applied" when the model carries the patch; raises UserError where it does not."""
        missing = [
            path
            for entry, root, path in self._match(target)
            if entry.kind == "lowrank" and self.name not in [b.name for b in branched(root, path).branches]
        ]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.entries)} layers lack patch {self.name!r}: {missing[0]} first"
            )
        total = sum(len(e.tensors) for e in self.entries.values())
        return f"{total} of {total} tensors applied"

    def truncated(self, rank: int) -> Patch:
        """Dense entries as low-rank ones of at most `rank`; what is lost is in the report and printed."""
        entries, lost = dict(self.entries), {}
        for path, entry in self.entries.items():
            if entry.kind == "dense":
                entries[path], lost[path] = _truncate(entry, rank)
        if lost:
            worst = max(lost, key=lambda p: lost[p])
            print(f"truncated {len(lost)} dense entries to rank {rank}; at most {lost[worst]:.1%} lost ({worst})")
        return dataclasses.replace(self, entries=entries, report=self.report | {"truncated": lost}, _kept=[])

    def _put(self, entry: Entry, root: nn.Module, path: str, scale: float) -> None:
        if entry.kind == "lowrank":
            layer = branched(root, path)
            like = layer.weight_scales if layer.bits != 16 else layer.weight
            made = Branch(
                name=self.name,
                down=entry.tensors["down"].to(like.device, like.dtype),
                up=entry.tensors["up"].to(like.device, like.dtype),
                scale=scale * entry.scale,
                origin=self.method,
                scope=entry.scope,
            )
            layer.attach(made)
            return
        module: Any = root.get_submodule(path)
        with torch.no_grad():
            self._kept.append((module, module.weight.detach().clone()))
            module.weight.copy_(_changed(entry, module.weight, scale))

    def _match(self, target: Any) -> list[tuple[Entry, nn.Module, str]]:
        """Each entry with its root module and the path below it; raises UserError unless all of them fit."""
        roots = roots_of(target)
        found, bad = [], []
        for path, entry in self.entries.items():
            place = locate(roots, path)
            why = "no such layer" if place is None else _misfit(entry, place[0].get_submodule(place[1]))
            if place is None or why:
                bad.append(f"{path} ({why})")
            else:
                found.append((entry, *place))
        if bad or not self.entries:
            shown = "; ".join(bad[:3]) or "the patch is empty"
            raise UserError(
                f"{len(found)} of {len(self.entries)} layers of patch {self.name!r} fit this model; not: {shown}"
            )
        return found

    def _check_base(self, target: Any) -> None:
        if not self.base:
            warnings.warn(
                f"patch {self.name!r} does not say which model it was made for; shapes fit, more is not known",
                stacklevel=3,
            )
            return
        hashes = [base_hash(root) for root in roots_of(target).values()]
        if self.base not in hashes:
            warnings.warn(
                f"patch {self.name!r} was made for another base ({self.base[:12]}..., this is {hashes[0][:12]}...)",
                stacklevel=3,
            )


def _misfit(entry: Entry, module: nn.Module) -> str:
    """Why an entry does not go onto a module; empty when it does."""
    if entry.kind == "rows":
        if not isinstance(module, nn.Embedding):
            return f"rows go into an embedding, this is a {type(module).__name__}"
        fits = entry.tensors["rows"].shape[1] == module.embedding_dim
        return "" if fits and int(entry.tensors["ids"].max()) < module.num_embeddings else "shape"
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__}, not a linear layer"
    outputs, inputs = module.out_features, module.in_features
    if entry.kind == "lowrank":
        up, down = entry.tensors["up"].shape, entry.tensors["down"].shape
        if up[1] != down[0]:
            return f"rank {down[0]} down, rank {up[1]} up"
        made = (up[0], down[1])
        return "" if made == (outputs, inputs) else f"made for {made}, this is {(outputs, inputs)}"
    if isinstance(module, BranchedLinear) and module.bits != 16:
        return f"{entry.kind} changes cannot go onto {module.bits}-bit weights; truncate them, or quantize again"
    want = (outputs, inputs) if entry.kind == "dense" else (outputs, outputs)
    got = tuple(next(iter(entry.tensors.values())).shape)
    return "" if got == want else f"made for {got}, this needs {want}"


def _changed(entry: Entry, weight: Tensor, scale: float) -> Tensor:
    """A weight with an entry added for good, in the weight's own type."""
    if entry.kind == "rows":
        out = weight.detach().clone()
        out[entry.tensors["ids"].to(weight.device)] = entry.tensors["rows"].to(weight)
        return out
    wide = weight.detach().float()
    tensors = {k: t.to(weight.device, torch.float32) for k, t in entry.tensors.items()}
    if entry.kind == "lowrank":
        wide = wide + scale * entry.scale * tensors["up"] @ tensors["down"]
    elif entry.kind == "dense":
        wide = wide + scale * entry.scale * tensors["delta"]
    else:
        wide = tensors["rotation"] @ wide
    return wide.to(weight.dtype)


def _truncate(entry: Entry, rank: int) -> tuple[Entry, float]:
    """The best low-rank entry for a dense one, and the share of its norm that is lost."""
    delta = entry.tensors["delta"].float()
    left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    root = sizes[:rank].sqrt()
    made = {"up": left[:, :rank] * root, "down": root[:, None] * right[:rank]}
    lost = float(sizes[rank:].norm() / sizes.norm().clamp_min(1e-30))
    return dataclasses.replace(entry, kind="lowrank", tensors=made), lost
