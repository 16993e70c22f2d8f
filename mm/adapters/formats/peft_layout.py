"""LoHa, LoKr and OFT by peft's own names, with the settings that peft builds its layers by.

Design choices
- Rank and alpha of a layer stand in patterns where they differ. A layer that peft would build in another form than the
  entry has is written in peft's form, where that holds the same change, and is an error otherwise.

Legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mm.adapters.cayley import side_of
from mm.adapters.entry import Entry
from mm.adapters.factors import shape_of
from mm.core.errors import UserError

TYPES = {"hadamard": "LOHA", "kron": "LOKR", "kron_product": "LOKR", "oft": "OFT"}


def peft_type(entries: Mapping[str, Entry]) -> str:
    """The tuner of peft that all of a patch's entries are of; empty where there is none."""
    found = {TYPES.get(entry.kind, "") for entry in entries.values()}
    return found.pop() if len(found) == 1 else ""


def factors_of_peft(entries: Mapping[str, Entry]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by layer and peft's names, and peft's settings.

    Args:
        entries: by path in the model, all of one tuner (`peft_type`).

    Raises:
        UserError: for what peft's layers cannot hold.
    """
    kind = peft_type(entries)
    if kind == "OFT":
        return _oft(entries)
    factor = _factor(entries) if kind == "LOKR" else None
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, entry in entries.items():
        parts, ranks[path] = _loha(entry) if factor is None else _lokr(entry)
        tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
    alphas = {path: entry.scale * ranks[path] for path, entry in entries.items()}
    rank, alpha = max(ranks.values()), max(alphas.values())
    settings = {
        "peft_type": kind, "r": rank, "alpha": alpha, "target_modules": sorted(entries),
        "rank_pattern": {f"^{path}": value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{path}": value for path, value in alphas.items() if value != alpha},
    }  # fmt: skip
    return tensors, settings | ({} if factor is None else {"decompose_factor": factor})


def _loha(entry: Entry) -> tuple[dict[str, Tensor], int]:
    t = entry.tensors
    if t["w1_b"].shape != t["w2_b"].shape:
        raise UserError("a LoHa of two ranks is none of peft's; write layout 'kohya', 'comfyui' or 'mm'")
    return {f"hada_{part}": tensor for part, tensor in t.items()}, len(t["w1_b"])


def _lokr(entry: Entry) -> tuple[dict[str, Tensor], int]:
    """peft keeps the second factor whole from half its longer side on, as a product below."""
    t = entry.tensors
    if entry.kind == "kron":
        return {"lokr_w1": t["first"], "lokr_w2": t["second"]}, (max(t["second"].shape) + 1) // 2
    rank = len(t["down"])
    if 2 * rank >= max(len(t["up"]), t["down"].shape[1]):
        second = (t["up"].float() @ t["down"].float()).to(t["up"].dtype)
        return {"lokr_w1": t["first"], "lokr_w2": second}, rank
    return {"lokr_w1": t["first"], "lokr_w2_a": t["up"], "lokr_w2_b": t["down"]}, rank


def _factor(entries: Mapping[str, Entry]) -> int:
    """The setting by which peft splits every layer's sides into these factors."""
    from peft.tuners.lokr.layer import factorization

    wanted = set()
    for entry in entries.values():
        for side, first in zip(shape_of(entry), entry.tensors["first"].shape, strict=True):
            assert side is not None
            wanted.add((side, first))
    for factor in (*sorted({first for _, first in wanted}, reverse=True), -1):
        if all(factorization(side, factor)[0] == first for side, first in wanted):
            return factor
    raise UserError(
        "peft splits the sides of all layers by one rule, and no such rule gives this LoKr's factors; write layout "
        "'kohya', 'comfyui' or 'mm'"
    )


def _oft(entries: Mapping[str, Entry]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    skews = [entry.tensors["skew"] for entry in entries.values()]
    terms = {int(entry.tensors["terms"]) for entry in entries.values()}
    strengths = {entry.scale for entry in entries.values()}
    shared = all(len(skew) == 1 for skew in skews)  # among others, one row is one block of all inputs
    side = _block_size({(len(skew) * side_of(skew.shape[1]), side_of(skew.shape[1])) for skew in skews}, shared)
    if len(terms) > 1 or strengths != {1.0} or not side:
        raise UserError(
            "peft turns all layers' inputs by one rule and in full, and this OFT has several, or another scale; write "
            "layout 'kohya', 'comfyui' or 'mm'"
        )
    number = terms.pop()
    settings: dict[str, Any] = {
        "peft_type": "OFT", "r": 0, "oft_block_size": side, "block_share": shared, "use_cayley_neumann": number > 0,
        "target_modules": sorted(entries),
    }  # fmt: skip
    if number:
        settings["num_cayley_neumann_terms"] = number
    return {f"{path}.oft_R.weight": entry.tensors["skew"] for path, entry in entries.items()}, settings


def _block_size(wanted: set[tuple[int, int]], shared: bool) -> int:
    """The setting by which peft makes blocks of these sides for these numbers of inputs; 0 where there is none."""
    from peft.tuners.oft.layer import OFTLayer

    sides = sorted({side for _, side in wanted})
    if shared or len(sides) == 1:  # the inputs of shared blocks are not known
        return sides[0] if len(sides) == 1 else 0

    adjusted: Any = OFTLayer.adjust_oft_parameters  # reads nothing of its layer

    def made(inputs: int, size: int) -> int:
        """What peft makes of a size: one that divides the inputs stays, else the nearest that does."""
        return size if inputs % size == 0 else int(adjusted(None, inputs, size))

    return next((size for size in sides if all(made(inputs, size) == side for inputs, side in wanted)), 0)
