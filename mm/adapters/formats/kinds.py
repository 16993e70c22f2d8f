"""What an adapter's tensors stand for: a thin product, or a change of a whole weight; and a change of the bias.

Source of DoRA: Liu et al. 2024; of the products: `products`; of rotations: `rotations`.

Design choices
- A LoRA on linear layers stays a thin product, and LoHa, LoKr, OFT and DoRA keep their factors there where each layer
  has rows of its own. All else is computed exactly as a change of the weight, in fp32.
- Shapes are compared with the model's before a product is computed, so that no file makes an allocation larger than the
  weights that it changes.
- DoRA's magnitude lies along the outputs (peft, and LyCORIS for new files) or along the inputs (LyCORIS' first files:
  a leading 1). It needs the layer's own weight W: with D the other change, W + D is scaled to that magnitude.

Legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.adapters.factors import base_weight, rows_of, whole_change
from mm.adapters.formats.layouts import Parts
from mm.adapters.formats.names import Piece, outputs
from mm.adapters.formats.products import factored, full_change, matrices, product
from mm.adapters.formats.rotations import blocks_of
from mm.adapters.formats.settings import Strengths
from mm.core.errors import UserError

_LORA = {"down", "up"}
KINDS = {
    "oft_": "OFT",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "diff": "a full change",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What one name in a file stands for. `down` (r, K) and `up` (N, r) with `scale`, or `factors` for the rows of all
    its layers, or `delta` in the weight's shape; `bias` (N,). `kind` is for messages."""

    kind: str
    scale: float = 1.0
    down: Tensor | None = None
    up: Tensor | None = None
    factors: Entry | None = None
    delta: Tensor | None = None
    bias: Tensor | None = None

    @property
    def of_weight(self) -> bool:
        """Whether it acts in the weight."""
        return self.factors is not None or self.delta is not None


def change_of(module: str, parts: Parts, pieces: Sequence[Piece], strengths: Strengths) -> Change:
    """The change that a module's tensors stand for.

    Args:
        module: its name in the file.
        parts: its tensors.
        pieces: the rows of the model's layers that it changes.
        strengths: of the file.

    Raises:
        UserError: where tensors are missing or their shapes do not fit, with the key.
    """
    tensors = parts.tensors
    kind = next((k for mark, k in KINDS.items() if any(part.startswith(mark) for part in tensors)), "LoRA")
    shape = _shape(module, pieces)
    if kind == "OFT":
        return _weighed(kind, blocks_of(module, parts, shape, strengths.section_of(module)), pieces)
    _check_complete(module, parts)
    scale = strengths.of(module, _rank(tensors), float(tensors["alpha"]) if "alpha" in tensors else None)
    bias = _bias(module, parts, shape[0], scale)
    named = set(tensors) - {"alpha", "up_bias", "diff_b"}
    if named == _LORA and all(isinstance(piece.layer, nn.Linear) for piece in pieces):
        down, up = matrices(module, parts, shape)
        return Change(kind=kind, scale=scale, down=down, up=up, bias=bias)
    if not named:
        return Change(kind=kind, bias=bias)
    factors = _factors(module, parts, shape, scale)
    if factors is not None and fit(factors, pieces):
        return Change(kind=kind, factors=factors, bias=bias)
    made = product(module, parts, shape)
    delta = torch.zeros(shape) if made is None else scale * made
    if "diff" in tensors:
        delta = delta + full_change(module, parts, shape)
    magnitude = tensors.get("magnitude", tensors.get("dora_scale"))
    if magnitude is not None:
        delta = _dora(module, parts, magnitude, delta, pieces)
    return Change(kind=kind, delta=delta.to(_dtype_of_change(pieces)), bias=bias)


def fit(factors: Entry, pieces: Sequence[Piece]) -> bool:
    """Whether every layer can hold its rows in factors: it is a linear one that is changed as a whole."""
    return all(
        isinstance(piece.layer, nn.Linear)
        and (piece.start, piece.count) == (0, outputs(piece.layer))
        and rows_of(factors, piece.source, piece.count) is not None
        for piece in pieces
    )


def _weighed(kind: str, factors: Entry, pieces: Sequence[Piece]) -> Change:
    """A change in factors, or where the layers cannot hold these the change of their weights."""
    if fit(factors, pieces):
        return Change(kind=kind, factors=factors)
    weight = torch.cat([_base(piece).float().cpu() for piece in pieces])
    delta = whole_change(factors, weight.flatten(1)).view(weight.shape)
    return Change(kind=kind, delta=delta.to(_dtype_of_change(pieces)))


def _factors(module: str, parts: Parts, shape: tuple[int, ...], scale: float) -> Entry | None:
    """The entry that holds an adapter's factors; None where there is no kind for them."""
    t = parts.tensors
    magnitude = t.get("magnitude", t.get("dora_scale"))
    if "diff" in t or "mid" in t:
        return None
    if magnitude is None:
        made = factored(module, parts, shape)
        return None if made is None else replace(made, scale=scale)
    if "down" not in t or len(shape) != 2 or magnitude.numel() != shape[0] or _along_inputs(parts, magnitude, shape[0]):
        return None
    down, up = matrices(module, parts, shape)
    tensors = {"down": down, "up": scale * up.float(), "magnitude": magnitude.flatten()}
    return Entry(kind="dora", tensors=tensors)


def _shape(module: str, pieces: Sequence[Piece]) -> tuple[int, ...]:
    """Of the weight that the name stands for: rows of all pieces, and what one row is."""
    tails = {_tail(piece.layer) for piece in pieces}
    if len(tails) != 1:
        raise UserError(f"{module} stands for layers of different inputs here: {sorted(tails)}")
    return (sum(piece.count for piece in pieces), *tails.pop())


def _tail(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    weight = layer._parameters["weight"]
    assert weight is not None
    return tuple(weight.shape[1:])


def _check_complete(module: str, parts: Parts) -> None:
    """Raises where one tensor of a product lacks the other."""
    have = set(parts.tensors)
    need: list[set[str]] = []
    if have & {"down", "up", "mid", "up_bias"}:
        need.append({"down", "up"})
    if any(part.startswith("hada_") for part in have):
        need.append({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    if "hada_t1" in have or "hada_t2" in have:
        need.append({"hada_t1", "hada_t2"})
    for side in ("lokr_w1", "lokr_w2"):
        if any(part.startswith("lokr_") for part in have) and side not in have:
            need.append({f"{side}_a", f"{side}_b"})
    missing = sorted(set().union(*need) - have) if need else []
    if missing:
        names = {"down": "first half (lora_A, lora_down)", "up": "second half (lora_B, lora_up)"}
        there = ", ".join(repr(key) for key in parts.keys.values())
        raise UserError(f"{module} lacks its {names.get(missing[0], missing[0])}; the file has only {there}")
    twice = any({f"lokr_{side}", f"lokr_{side}_a"} <= have for side in ("w1", "w2")) or {"lokr_t2", "lokr_w2"} <= have
    families = [have & {"down", "up"}, {p for p in have if p.startswith("hada_")}, {p for p in have if "lokr_" in p}]
    if twice or sum(bool(f) for f in families) > 1 or {"magnitude", "dora_scale"} <= have:
        raise UserError(f"{module} has tensors of several adapters at once: {', '.join(parts.keys.values())}")
    if have & {"magnitude", "dora_scale"} and "up_bias" in have:
        raise UserError(f"{parts.keys['up_bias']!r}: a bias inside a DoRA is not supported")
    if not have & {"diff", "diff_b"} and not any(families):
        raise UserError(f"{module} has {', '.join(repr(k) for k in parts.keys.values())} and nothing to apply")


def _rank(tensors: Mapping[str, Tensor]) -> int | None:
    for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in tensors:
            return int(tensors[part].shape[0])
    return None


def _bias(module: str, parts: Parts, outputs: int, scale: float) -> Tensor | None:
    found = [(parts.tensors[p].float() * s, p) for p, s in (("up_bias", scale), ("diff_b", 1.0)) if p in parts.tensors]
    for tensor, part in found:
        if tensor.numel() != outputs:
            raise UserError(
                f"{parts.keys[part]!r} has shape {tuple(tensor.shape)}, {module} has {outputs} outputs here"
            )
    return sum((tensor.flatten() for tensor, _ in found), torch.zeros(outputs)) if found else None


def _dtype_of_change(pieces: Sequence[Piece]) -> torch.dtype:
    """That of the layers, or bfloat16 where that is wider."""
    weight = pieces[0].layer._parameters.get("weight")
    own = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
    return torch.promote_types(own, torch.bfloat16)


def _base(piece: Piece) -> Tensor:
    """The rows' weight before any patch."""
    return base_weight(piece.layer, piece.path)[piece.start : piece.start + piece.count]


def _along_inputs(parts: Parts, magnitude: Tensor, outputs: int) -> bool:
    """Whether a magnitude is LyCORIS' first form: a leading 1, and a value for each input."""
    return "magnitude" not in parts.tensors and magnitude.ndim > 1 and magnitude.shape[0] == 1 and outputs != 1


def _dora(module: str, parts: Parts, magnitude: Tensor, delta: Tensor, pieces: Sequence[Piece]) -> Tensor:
    weight = torch.cat([_base(piece).float().to(delta.device) for piece in pieces])
    merged = weight + delta
    part = "magnitude" if "magnitude" in parts.tensors else "dora_scale"
    outputs, inputs = merged.shape[0], merged.shape[1] if merged.ndim > 1 else 0
    along_inputs = _along_inputs(parts, magnitude, outputs)
    if magnitude.numel() != (inputs if along_inputs else outputs):
        raise UserError(
            f"{parts.keys[part]!r} has shape {tuple(magnitude.shape)}; {module} has {outputs} outputs and {inputs} "
            "inputs here"
        )
    dims = [d for d in range(merged.ndim) if d != (1 if along_inputs else 0)]
    norm = torch.linalg.vector_norm(merged, dim=dims, keepdim=True)
    eps = torch.finfo(torch.float32).tiny if part == "magnitude" else torch.finfo(torch.float32).eps
    return merged * (magnitude.float().reshape(norm.shape) / (norm + eps)) - weight
