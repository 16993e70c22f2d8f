"""Which layers of a model a patch's entries go onto, or why they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm.adapters.entry import Entry
from mm.adapters.factors import WHOLE, called, factors_misfit, shape_misfit
from mm.core.errors import UserError
from mm.core.nouns import counted, with_article
from mm.layers.linear import BranchedLinear
from mm.layers.offloading import cannot_change, stored
from mm.layers.surgery import locate, no_branches, no_plain_weight, roots_of, submodule


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """An entry and the layer it goes onto; `path` as the patch has it."""

    path: str
    entry: Entry
    module: nn.Module
    root: nn.Module

    @property
    def key(self) -> tuple[int, bool]:
        """The layer, and whether its bias is meant: a patch changes each once."""
        return id(self.module), self.entry.kind == "bias"


def layer_path(path: str, entry: Entry) -> str:
    """The path of an entry's layer; that of a bias entry is the bias's own."""
    return path.removesuffix(".bias") if entry.kind == "bias" else path


def match(name: str, entries: Mapping[str, Entry], target: Any) -> list[Place]:
    """Each entry with its layer; nothing is changed.

    Args:
        name: of the patch, for messages.
        entries: by path.
        target: a module or pipeline.

    Raises:
        UserError: unless all of them fit; with the first that do not, and why.
    """
    roots = roots_of(target)
    found: dict[tuple[int, bool], Place] = {}
    bad, advice = [], ""
    for path, entry in entries.items():
        spot = locate(roots, layer_path(path, entry))
        module = None if spot is None else submodule(*spot)
        if spot is None or module is None:
            bad.append(f"{path} (no such layer)")
            continue
        place = Place(path=path, entry=entry, module=_shared(module, entry, spot[0]), root=spot[0])
        twin = found.get(place.key)
        why = f"the same layer as {twin.path}" if twin else _misfit(entry, place.module, spot[0])
        if why:
            bad.append(f"{path} ({why})")
            advice = advice or _advice(entry, place.module)
        else:
            found[place.key] = place
    if bad or not entries:
        shown = "; ".join(bad[:3]) or "the patch is empty"
        raise UserError(
            f"{len(found)} of {counted(len(entries), 'layer')} of patch {name!r} fit this model; not: {shown}{advice}"
        )
    return list(found.values())


def _advice(entry: Entry, module: nn.Module) -> str:
    """What to do about an entry that does not go onto a quantized layer; empty for other ones."""
    if entry.kind in ("lowrank", "rows", "bias") or not isinstance(module, BranchedLinear) or module.bits == 16:
        return ""
    return (
        ". Use the 16-bit model, or the nearest LoRA: mm.Patch.load(FILE).truncated(RANK, MODEL).save(...) writes it "
        "and prints what is lost"
    )


def _sharers(module: nn.Module, root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of the model with the very weight of `module`, itself among them."""
    weight = stored(module, "weight")
    if weight is None:
        return []
    own = module._parameters.get("weight")

    def same(other: nn.Module) -> bool:
        parameter = other._parameters.get("weight")
        if parameter is None or parameter.shape != weight.shape:
            return False
        return parameter is own or (own is not None and own.is_meta and _pointer(other) == weight.data_ptr())

    return [(path, other) for path, other in root.named_modules() if same(other)]


def _pointer(module: nn.Module) -> int:
    tensor = stored(module, "weight")
    return 0 if tensor is None else tensor.data_ptr()


def _shared(module: nn.Module, entry: Entry, root: nn.Module) -> nn.Module:
    """The first of the modules that share a table, so that patches of different names for it meet in one list."""
    if entry.kind != "rows" or not isinstance(module, nn.Embedding) or no_plain_weight(module):
        return module
    tables = [other for _, other in _sharers(module, root) if isinstance(other, nn.Embedding)]
    return tables[0] if tables else module


def _misfit(entry: Entry, module: nn.Module, root: nn.Module) -> str:
    """Why an entry does not go onto a module; empty when it does."""
    if not all(bool(torch.isfinite(t).all()) for t in entry.tensors.values() if t.is_floating_point()):
        return "NaN or infinity among its values"
    if why := _unloaded(module):
        return why
    if entry.kind == "rows":
        return _rows_misfit(entry, module)
    if entry.kind == "lowrank":
        return no_branches(module) or _lowrank_misfit(entry, module)
    if entry.kind == "bias":
        return _bias_misfit(entry, module)
    return _dense_misfit(entry, module, root)


def _unloaded(module: nn.Module) -> str:
    """Why a layer's weight cannot be read; empty where it can, and where the layer has none."""
    try:
        for name in ("weight", "qweight"):
            stored(module, name)
    except UserError as error:
        return str(error)
    return ""


def _rows_misfit(entry: Entry, module: nn.Module) -> str:
    if not isinstance(module, nn.Embedding):
        return f"rows go into an embedding, this is {with_article(type(module).__name__)}"
    if why := no_plain_weight(module) or cannot_change(module, "weight"):
        return why
    ids, rows = entry.tensors["ids"], entry.tensors["rows"]
    if ids.ndim != 1 or rows.ndim != 2 or not len(ids) or len(ids) != len(rows) or ids.is_floating_point():
        return f"ids {tuple(ids.shape)} and rows {tuple(rows.shape)}, which need shapes (n,) and (n, width)"
    if rows.shape[1] != module.embedding_dim:
        return f"shape: rows of width {rows.shape[1]}, this embedding has {module.embedding_dim}"
    if int(ids.min()) < 0 or int(ids.max()) >= module.num_embeddings:
        return f"shape: ids {int(ids.min())} to {int(ids.max())}, this embedding has {module.num_embeddings} rows"
    return "" if len(ids.unique()) == len(ids) else "the same id twice"


def _lowrank_misfit(entry: Entry, module: nn.Module) -> str:
    assert isinstance(module, nn.Linear)
    up, down = entry.tensors["up"].shape, entry.tensors["down"].shape
    if len(up) != 2 or len(down) != 2:
        return f"down {tuple(down)} and up {tuple(up)} are no matrices"
    if up[1] != down[0]:
        return f"rank {down[0]} down, rank {up[1]} up"
    made, here = (up[0], down[1]), (module.out_features, module.in_features)
    return "" if made == here else f"made for {made}, this is {here}"


def _bias_misfit(entry: Entry, module: nn.Module) -> str:
    bias = module._parameters.get("bias")
    if bias is None or not bias.is_floating_point():
        return f"{with_article(type(module).__name__)} without a bias"
    got = tuple(entry.tensors["delta"].shape)
    return cannot_change(module, "bias") or (
        "" if got == bias.shape else f"made for {got}, this is {tuple(bias.shape)}"
    )


def _dense_misfit(entry: Entry, module: nn.Module, root: nn.Module) -> str:
    if not isinstance(module, nn.Linear) and (entry.kind != "dense" or isinstance(module, nn.Embedding)):
        return no_branches(module)
    if isinstance(module, BranchedLinear) and module.bits != 16:
        return f"{called(entry.kind)}, a change of the whole weight, cannot go onto {module.bits}-bit weights"
    if why := no_plain_weight(module) or cannot_change(module, "weight"):
        return why
    shape = tuple(module._parameters["weight"].shape)  # type: ignore[union-attr]
    if entry.kind in WHOLE:
        if why := factors_misfit(entry) or shape_misfit(entry, shape):
            return why
    elif (got := tuple(entry.tensors["rotation"].shape)) != (shape[0], shape[0]):
        return f"made for {got}, this needs {(shape[0], shape[0])}"
    others = [path for path, other in _sharers(module, root) if other is not module]
    return f"its weight is also that of {others[0]}, which would change too" if others else ""
