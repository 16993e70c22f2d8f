"""From changes by name to a patch's entries by layer: rows are dealt out, and several names on one layer are joined.

Legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.adapters.entry import Entry
from mm.adapters.factors import rows_of
from mm.adapters.formats.kinds import Change
from mm.adapters.formats.names import Piece, outputs
from mm.core.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What one name in the file does to some rows of a layer."""

    module: str
    piece: Piece
    change: Change

    @property
    def rows(self) -> slice:
        """Of the layer."""
        return slice(self.piece.start, self.piece.start + self.piece.count)

    def own(self, tensor: Tensor) -> Tensor:
        """Those rows of a tensor of the file that are meant."""
        return tensor[self.piece.source : self.piece.source + self.piece.count]


def entries_of(parts: Sequence[Part]) -> dict[str, Entry]:
    """Entries by path; a change of a bias stands under the path of the bias.

    Raises:
        UserError: where two names of the file stand for the same rows of a layer.
    """
    layers: dict[str, list[Part]] = {}
    for part in parts:
        layers.setdefault(part.piece.path, []).append(part)
    entries: dict[str, Entry] = {}
    for path, here in layers.items():
        _check_apart(path, here)
        weights = [p for p in here if p.change.of_weight or p.change.down is not None]
        if weights:
            entries[path] = _weight_entry(weights)
        biases = [p for p in here if p.change.bias is not None]
        if biases:
            entries[f"{path}.bias"] = Entry(kind="bias", tensors={"delta": _bias(biases)})
    return entries


def _check_apart(path: str, here: Sequence[Part]) -> None:
    taken: list[Part] = []
    for part in here:
        twin = next((t for t in taken if t.rows.start < part.rows.stop and part.rows.start < t.rows.stop), None)
        if twin is not None:
            raise UserError(
                f"{twin.module!r} and {part.module!r} in the file are the same layer here, {path}; which one counts is "
                "not known"
            )
        taken.append(part)


def _weight_entry(here: Sequence[Part]) -> Entry:
    first = here[0]
    if all(p.change.down is not None for p in here):
        return _lowrank(here)
    if first.change.factors is not None:  # of the whole layer, so that there is no other part
        made = rows_of(first.change.factors, first.piece.source, first.piece.count)
        assert made is not None and len(here) == 1
        return made
    whole = _full(first.change)
    if len(here) == 1 and first.rows == slice(0, outputs(first.piece.layer)):
        return Entry(kind="dense", tensors={"delta": first.own(whole)})
    delta = torch.zeros(outputs(first.piece.layer), *whole.shape[1:], dtype=whole.dtype)
    for part in here:
        delta[part.rows] = part.own(_full(part.change)).to(delta)
    return Entry(kind="dense", tensors={"delta": delta})


def _full(change: Change) -> Tensor:
    if change.delta is not None:
        return change.delta
    assert change.down is not None and change.up is not None
    return change.scale * change.up.float() @ change.down.float()


def _lowrank(here: Sequence[Part]) -> Entry:
    """One product; parts of the same name share their `down`, others' stand below each other."""
    first = here[0]
    assert first.change.down is not None and first.change.up is not None
    if len(here) == 1 and first.rows == slice(0, outputs(first.piece.layer)):
        tensors = {"down": first.change.down, "up": first.own(first.change.up)}
        return Entry(kind="lowrank", tensors=tensors, scale=first.change.scale)
    changes = list({id(p.change): p.change for p in here}.values())
    starts, rank = {}, 0
    for change in changes:
        assert change.down is not None
        starts[id(change)] = rank
        rank += len(change.down)
    up = torch.zeros(outputs(first.piece.layer), rank)
    for part in here:
        assert part.change.up is not None
        start = starts[id(part.change)]
        piece = part.own(part.change.up).float()
        up[part.rows, start : start + piece.shape[1]] = piece * (part.change.scale if len(changes) > 1 else 1.0)
    down = torch.cat([change.down.float() for change in changes if change.down is not None])
    scale = first.change.scale if len(changes) == 1 else 1.0
    return Entry(kind="lowrank", tensors={"down": down, "up": up}, scale=scale)


def _bias(here: Sequence[Part]) -> Tensor:
    whole = torch.zeros(outputs(here[0].piece.layer))
    for part in here:
        assert part.change.bias is not None
        whole[part.rows] = part.own(part.change.bias)
    return whole
