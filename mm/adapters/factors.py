"""Changes of a whole weight that an entry holds in factors, and the change that they stand for.

Sources: LoHa (Hyeon-Woo et al. 2022, FedPara, arXiv 2108.06098), LoKr (Edalati et al. 2022, KronA, arXiv 2212.10650),
both as LyCORIS has them (Yeh et al. 2023, arXiv 2309.14859); DoRA (Liu et al. 2024, arXiv 2402.09353); OFT (Qiu et al.
2023, arXiv 2306.07280); SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175).

Design choices
- The factors are kept, in memory and in files, and multiplied when the weight is computed, one layer at a time: of a
  large model the changes themselves take as much memory as the model.
- DoRA's and OFT's change depends on the weight. It is that of the layer's weight before any patch, so that changes add
  up and commute, as those of other kinds do.

Legend: N outputs, K inputs, r rank, n values, b side of a block.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from mm.adapters.cayley import side_of, turning
from mm.adapters.entry import DIMS, Entry
from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear
from mm.layers.offloading import stored
from mm.layers.originals import original_weight

OF_WEIGHT = ("dora", "oft", "output_blocks")  # kinds whose change depends on the weight
MOST_TERMS = 64  # of a series for OFT
FACTORED = ("hadamard", "kron", "kron_product", "sparse", *OF_WEIGHT)
_PRODUCTS = {  # matrices that are multiplied, by kind
    "hadamard": (("w1_a", "w1_b"), ("w2_a", "w2_b")), "kron_product": (("up", "down"),), "dora": (("up", "down"),),
}  # fmt: skip
WHOLE = ("dense", *FACTORED)  # kinds that change a whole weight, and act in it

_CALLED = {
    "dense": "a full change", "rotation": "a rotation", "hadamard": "LoHa", "kron": "LoKr", "kron_product": "LoKr",
    "sparse": "SHiRA", "dora": "DoRA",
}  # fmt: skip


def called(kind: str) -> str:
    """What users call a kind that changes a whole weight."""
    return _CALLED.get(kind, "OFT")


def whole_change(entry: Entry, weight: Tensor | None = None) -> Tensor:
    """The change W' - W that an entry of a kind in `WHOLE` stands for, at a scale of 1.

    Args:
        entry: of which only kind and tensors count.
        weight: of the layer before any patch, in fp32; None where the kind does not depend on it.

    Returns:
        The change in the weight's shape, (N, K) for factors, in the weight's type and on its device; without a weight
        in fp32.
    """
    dtype, device = (torch.float32, None) if weight is None else (weight.dtype, weight.device)
    t = {k: x.to(device, dtype) if x.is_floating_point() else x.to(device) for k, x in entry.tensors.items()}
    if entry.kind == "dense":
        return t["delta"]
    if entry.kind == "hadamard":
        return (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])
    if entry.kind == "kron":
        return torch.kron(t["first"], t["second"])
    if entry.kind == "kron_product":
        return torch.kron(t["first"], t["up"] @ t["down"])
    if entry.kind == "sparse":
        rows, columns = entry.tensors["size"].tolist()
        flat = torch.zeros(rows * columns, dtype=dtype, device=device)
        return flat.index_put_((t["indices"].long(),), t["values"]).view(rows, columns)
    if weight is None:
        raise ValueError(f"an entry of kind {entry.kind!r} needs the weight")
    if entry.kind == "dora":
        merged_NK = weight + t["up"] @ t["down"]
        norm_N1 = torch.linalg.vector_norm(merged_NK, dim=1, keepdim=True)
        return merged_NK * (t["magnitude"][:, None] / (norm_N1 + torch.finfo(dtype).tiny)) - weight
    if entry.kind == "oft":
        blocks = turning(t["skew"], int(t["terms"]))
        blocks = blocks.expand(weight.shape[1] // blocks.shape[1], -1, -1)
        return torch.einsum("ngk,gkj->ngj", weight.unflatten(1, (len(blocks), -1)), blocks).flatten(1)
    blocks = t["blocks"]
    return torch.einsum("gmn,gnk->gmk", blocks, weight.unflatten(0, (len(blocks), -1))).flatten(0, 1)


def shape_of(entry: Entry) -> tuple[int | None, ...]:
    """The shape of the weight that an entry of a kind in `WHOLE` changes; None for a side that is left open."""
    s = {name: tuple(tensor.shape) for name, tensor in entry.tensors.items()}
    if entry.kind == "dense":
        return s["delta"]
    if entry.kind == "hadamard":
        return (s["w1_a"][0], s["w1_b"][1])
    if entry.kind == "kron":
        return tuple(a * b for a, b in zip(s["first"], s["second"], strict=True))
    if entry.kind == "kron_product":
        return (s["first"][0] * s["up"][0], s["first"][1] * s["down"][1])
    if entry.kind == "sparse":
        return tuple(entry.tensors["size"].tolist())
    if entry.kind == "dora":
        return (s["up"][0], s["down"][1])
    if entry.kind == "oft":  # one row stands for any number of blocks
        return (None, None if s["skew"][0] == 1 else s["skew"][0] * side_of(s["skew"][1]))
    return (s["blocks"][0] * s["blocks"][1], None)


def shape_misfit(entry: Entry, shape: tuple[int, ...]) -> str:
    """Why an entry of a kind in `WHOLE` does not fit a weight of a shape; empty where it does."""
    got = shape_of(entry)
    if len(got) == len(shape) and all(one in (None, other) for one, other in zip(got, shape, strict=True)):
        side = side_of(entry.tensors["skew"].shape[1]) if entry.kind == "oft" else 1
        return f"blocks of {side} inputs, and the layer has {shape[1]}" if shape[-1] % side else ""
    return f"made for {tuple('any' if side is None else side for side in got)}, this needs {shape}"


def factors_misfit(entry: Entry) -> str:
    """Why the factors of an entry do not belong together; empty where they do, and for entries without factors."""
    if entry.kind not in FACTORED:
        return ""
    s = {name: list(tensor.shape) for name, tensor in entry.tensors.items()}
    odd = next((n for n, x in entry.tensors.items() if x.ndim not in DIMS[n] or not x.numel()), None)
    if odd is not None:
        return f"{odd} of shape {s[odd]}"
    for left, right in _PRODUCTS.get(entry.kind, ()):
        if s[left][1] != s[right][0]:
            return f"rank {s[left][1]} in {left} {s[left]} and {s[right][0]} in {right} {s[right]}"
    if entry.kind == "hadamard" and (s["w1_a"][0], s["w1_b"][1]) != (s["w2_a"][0], s["w2_b"][1]):
        return f"factors of {(s['w1_a'][0], s['w1_b'][1])} and {(s['w2_a'][0], s['w2_b'][1])}, which are not multiplied"
    if entry.kind == "dora" and s["magnitude"][0] != s["up"][0]:
        return f"{s['magnitude'][0]} magnitudes for {s['up'][0]} outputs"
    if entry.kind == "output_blocks" and s["blocks"][1] != s["blocks"][2]:
        return f"blocks of shape {s['blocks']}, which are not square"
    if entry.kind == "oft" and not side_of(s["skew"][1]):
        return f"{s['skew'][1]} values a block, which are no triangle of a square"
    if entry.kind == "oft" and (s["terms"] != [1] or not 0 <= int(entry.tensors["terms"]) <= MOST_TERMS):
        return f"terms {entry.tensors['terms'].tolist()[:4]}, not one number from 0 to {MOST_TERMS}"
    return _sparse_misfit(entry) if entry.kind == "sparse" else ""


def _sparse_misfit(entry: Entry) -> str:
    indices, values, size = (entry.tensors[name] for name in ("indices", "values", "size"))
    if len(size) != 2 or int(size.min()) < 1:
        return f"a size of {size.tolist()}, which is no shape of a matrix"
    if len(indices) != len(values):
        return f"{len(indices)} indices for {len(values)} values"
    if int(indices.min()) < 0 or int(indices.max()) >= math.prod(size.tolist()):
        return f"indices {int(indices.min())} to {int(indices.max())} in a weight of {size.tolist()}"
    return "the same index twice" if len(torch.unique(indices)) < len(indices) else ""


def rows_of(entry: Entry, start: int, count: int) -> Entry | None:
    """The entry of some rows of a weight; None where its factors are not cut by rows.

    Args:
        entry: of a kind in `FACTORED`.
        start: the first row.
        count: of rows.
    """
    t, rows = entry.tensors, slice(start, start + count)
    if entry.kind == "hadamard":
        made = t | {"w1_a": t["w1_a"][rows], "w2_a": t["w2_a"][rows]}
    elif entry.kind == "dora":
        made = t | {"up": t["up"][rows], "magnitude": t["magnitude"][rows]}
    elif entry.kind == "oft":
        made = t
    elif entry.kind in ("kron", "kron_product"):
        each = len(t["second" if entry.kind == "kron" else "up"])
        if start % each or count % each:
            return None
        made = t | {"first": t["first"][start // each : (start + count) // each]}
    else:
        return entry if start == 0 and shape_of(entry)[0] == count else None
    return dataclasses.replace(entry, tensors=made)


def base_weight(layer: nn.Module, path: str) -> Tensor:
    """A layer's weight before any patch; of a quantized layer what its base computes with.

    Args:
        layer: with a weight.
        path: for the message.

    Raises:
        UserError: for a layer whose weight cannot be read, such as one in 8 bits of another library.
    """
    if isinstance(layer, BranchedLinear) and layer.bits != 16:
        return layer.base_weight(torch.float32).detach()
    kept = original_weight(layer)
    found = stored(layer, "weight") if kept is None else kept
    own = (layer.in_features,) if isinstance(layer, nn.Linear) else None
    if found is None or not found.is_floating_point() or (own is not None and tuple(found.shape[1:]) != own):
        raise UserError(f"{path} has no plain weight ({type(layer).__name__}), which this adapter needs")
    return found.detach()
