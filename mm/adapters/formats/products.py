"""The changes of weights that LoRA, LoHa and LoKr stand for, computed in fp32 once the shapes fit.

Sources: LoRA (Hu et al. 2021); LoHa and the Tucker form of convolutions (Hyeon-Woo et al. 2022, FedPara); LoKr
(Edalati et al. 2022, KronA; Yeh et al. 2024, LyCORIS).
Legend: N outputs, K inputs (channels of a convolution), r rank, k positions of a kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mm.adapters.entry import Entry
from mm.adapters.formats.layouts import Parts
from mm.core.errors import UserError

Shape = tuple[int, ...]
_CORE = ("lokr_t2", "lokr_w2_a", "lokr_w2_b")


def full_change(module: str, parts: Parts, shape: Shape) -> Tensor:
    """A change that is stored as it is, in the weight's shape; sizes of 1 may be missing.

    Raises:
        UserError: where its shape is another.
    """
    got = tuple(parts.tensors["diff"].shape)
    if [n for n in got if n != 1] != [n for n in shape if n != 1]:
        raise UserError(f"{parts.keys['diff']!r} has shape {got}, {module} has {shape} here")
    return parts.tensors["diff"].float().reshape(shape)


def matrices(module: str, parts: Parts, shape: Shape) -> tuple[Tensor, Tensor]:
    """down (r, K k) and up (N, r) of a LoRA; those of a 1 x 1 convolution fit a linear layer and the other way round.

    Raises:
        UserError: where they do not make a change of that shape.
    """
    first, second = parts.tensors["down"], parts.tensors["up"]
    made = f"{parts.keys['down']!r} {tuple(first.shape)} and {tuple(second.shape)}"
    if first.ndim < 2 or second.ndim < 2 or math.prod(second.shape[1:]) != len(first):
        raise UserError(f"{made} make no product of two matrices")
    down, up = first.flatten(1), second.flatten(1)
    if (len(up), down.shape[1]) != (shape[0], math.prod(shape[1:])):
        raise UserError(f"{made} are made for {(len(up), down.shape[1])}; {module} has {shape} here")
    kernel = tuple(first.shape[2:])
    if kernel != shape[2:] and any(n != 1 for n in (*kernel, *shape[2:])):
        raise UserError(f"{made} are for a kernel of {kernel}; {module} has {shape} here")
    return down, up


def product(module: str, parts: Parts, shape: Shape) -> Tensor | None:
    """The change of the weight at strength 1, in the weight's shape; None where the parts hold no product.

    Raises:
        UserError: where tensors do not make a change of that shape.
    """
    have = parts.tensors
    if "mid" in have:
        return _tucker(module, parts, ("mid", "up", "down"), shape)
    if "down" in have:
        down, up = matrices(module, parts, shape)
        return (up.float() @ down.float()).reshape(shape)
    if "hada_t1" in have:
        one, two = (_tucker(module, parts, (f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b"), shape) for i in (1, 2))
        return one * two
    if "hada_w1_a" in have:
        return _pair(module, parts, "hada_w1", shape) * _pair(module, parts, "hada_w2", shape)
    return _lokr(module, parts, shape) if any(part.startswith("lokr_") for part in have) else None


def _pair(module: str, parts: Parts, stem: str, shape: Shape) -> Tensor:
    _check_pair(module, parts, stem, shape)
    a, b = (parts.tensors[f"{stem}_{side}"] for side in "ab")
    return (a.float() @ b.float()).reshape(shape)


def _check_pair(module: str, parts: Parts, stem: str, shape: Shape) -> None:
    """Raises UserError where two matrices make no weight of that shape."""
    a, b = (parts.tensors[f"{stem}_{side}"] for side in "ab")
    if _pair_shape(parts, stem) != (shape[0], math.prod(shape[1:])):
        key = parts.keys[f"{stem}_a"]
        raise UserError(f"{key!r} {tuple(a.shape)} and {tuple(b.shape)} make no weight of {module}, {shape} here")


def _pair_shape(parts: Parts, stem: str) -> Shape:
    a, b = (parts.tensors[f"{stem}_{side}"] for side in "ab")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b):
        raise UserError(f"{parts.keys[f'{stem}_a']!r} {tuple(a.shape)} and {tuple(b.shape)} make no product")
    return (len(a), b.shape[1])


def _tucker(module: str, parts: Parts, names: tuple[str, str, str], shape: Shape | None) -> Tensor:
    """core (r, r, k...) times a matrix along its first and one along its second side.

    kohya's `up` is (N, r), LoHa's and LoKr's first matrix (r, N); the second is (r, K). `shape` None: any.
    """
    made = _tucker_shape(parts, names)
    if shape is not None and made != shape:
        raise UserError(f"{parts.keys[names[0]]!r} and its matrices make {made}, {module} has {shape} here")
    core, first, second = (parts.tensors[name].float() for name in names)
    left = first.flatten(1).T if names[0] == "mid" else first
    return torch.einsum("ijkl,in,jc->nckl", core, left, second.flatten(1))


def _tucker_shape(parts: Parts, names: tuple[str, str, str]) -> Shape:
    core, first, second = (parts.tensors[name] for name in names)
    shapes = [tuple(tensor.shape) for tensor in (core, first, second)]
    if core.ndim == 4 and first.ndim >= 2 and second.ndim >= 2:
        rank, outputs = (first[0].numel(), len(first)) if names[0] == "mid" else (len(first), first[0].numel())
        if tuple(core.shape[:2]) == (rank, len(second)):
            return (outputs, second[0].numel(), *core.shape[2:])
    raise UserError(f"{parts.keys[names[0]]!r} and its matrices have shapes {shapes}, which make no product")


def _lokr(module: str, parts: Parts, shape: Shape) -> Tensor:
    """The Kronecker product of two factors, each whole or a product itself."""
    _check_lokr(module, parts, shape)
    t = {part: tensor.float() for part, tensor in parts.tensors.items()}
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    else:
        w2 = _tucker(module, parts, _CORE, None) if "lokr_t2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    # torch.kron views its result, which the strides of a product in Tucker form do not allow
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous()).reshape(shape)


def _check_lokr(module: str, parts: Parts, shape: Shape) -> None:
    """Raises UserError where the factors make no weight of that shape."""
    have = parts.tensors
    one = tuple(have["lokr_w1"].shape) if "lokr_w1" in have else _pair_shape(parts, "lokr_w1")
    if "lokr_w2" in have:
        two = tuple(have["lokr_w2"].shape)
    else:
        two = _tucker_shape(parts, _CORE) if "lokr_t2" in have else _pair_shape(parts, "lokr_w2")
    fits = len(one) == 2 and len(two) >= 2 and one[0] * two[0] == shape[0]
    if not fits or math.prod(one) * math.prod(two) != math.prod(shape):
        first = next(key for part, key in parts.keys.items() if part.startswith("lokr_"))
        raise UserError(f"{first!r}: factors of {one} and {two} make no weight of {module}, {shape} here")


def factored(module: str, parts: Parts, shape: Shape) -> Entry | None:
    """A LoHa or LoKr of a matrix as an entry that holds its factors; None for other adapters, and Tucker's form.

    Raises:
        UserError: where tensors do not make a change of that shape.
    """
    t = parts.tensors
    if len(shape) != 2 or {"hada_t1", "lokr_t2"} & set(t):
        return None
    if "hada_w1_a" in t:
        for stem in ("hada_w1", "hada_w2"):
            _check_pair(module, parts, stem, shape)
        return Entry(kind="hadamard", tensors={part: t[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b")})
    if not any(part.startswith("lokr_") for part in t):
        return None
    _check_lokr(module, parts, shape)
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"].float() @ t["lokr_w1_b"].float()
    if "lokr_w2" not in t:
        tensors = {"first": first, "up": t["lokr_w2_a"], "down": t["lokr_w2_b"]}
        return Entry(kind="kron_product", tensors=tensors)
    second = t["lokr_w2"].flatten(1)
    return Entry(kind="kron", tensors={"first": first, "second": second}) if first.ndim == 2 else None
