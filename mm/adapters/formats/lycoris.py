"""Changes of whole weights as tensors by LyCORIS' names, which kohya's scripts and ComfyUI read.

Source: Yeh et al. 2023, LyCORIS, arXiv 2309.14859. A change acts with alpha / rank there; a LoKr of two whole factors
acts in full. DoRA's alpha acts within the norm.

Legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mm.adapters.entry import Entry
from mm.adapters.factors import OF_WEIGHT, base_weight, factors_misfit, shape_misfit, whole_change
from mm.core.errors import UserError
from mm.layers.surgery import locate, roots_of, submodule

WeightOf = Callable[[str], Tensor]  # by path, a layer's weight (N, K) before any patch, in fp32


def weights_of(target: object) -> WeightOf:
    """Gives the weights of a model's layers by path.

    Args:
        target: a module or pipeline; None where there is none, which is an error once a weight is asked for.
    """

    def weight_of(path: str) -> Tensor:
        if target is None:
            raise UserError(f"{path} is changed by an adapter that depends on the model's weights; give target=")
        spot = locate(roots_of(target), path)
        layer = None if spot is None else submodule(*spot)
        if layer is None:
            raise UserError(f"{path} is no layer of this model")
        return base_weight(layer, path).float().cpu()

    return weight_of


def dense_of(entry: Entry, path: str, weight_of: WeightOf) -> Tensor:
    """What an entry that changes a whole weight adds to it, with its scale.

    Raises:
        UserError: where it depends on the weights and there is no model, or it does not fit this one.
    """
    if entry.kind not in OF_WEIGHT:
        return entry.scale * whole_change(entry)
    weight_NK = weight_of(path)
    if why := factors_misfit(entry) or shape_misfit(entry, tuple(weight_NK.shape)):
        raise UserError(f"{path} does not fit this model: {why}")
    return entry.scale * whole_change(entry, weight_NK)


def lycoris_tensors(entry: Entry, path: str, weight_of: WeightOf) -> dict[str, Tensor]:
    """The tensors of an entry that changes a whole weight, by the ends of their names.

    Args:
        entry: of a kind in `mm.adapters.factors.WHOLE`.
        path: of its layer, for the weight and messages.
        weight_of: gives the weight, where LyCORIS has no such factors, and the change is written as it is ("diff").

    Raises:
        UserError: where that needs a model and there is none.
    """
    t = entry.tensors
    if entry.kind == "hadamard":
        alpha = entry.scale * len(t["w1_b"])
        return {f"hada_{part}": tensor for part, tensor in t.items()} | _alpha(alpha)
    if entry.kind == "kron":
        return {"lokr_w1": entry.scale * t["first"], "lokr_w2": t["second"]}
    if entry.kind == "kron_product":
        factors = {"lokr_w1": t["first"], "lokr_w2_a": t["up"], "lokr_w2_b": t["down"]}
        return factors | _alpha(entry.scale * len(t["down"]))
    if entry.kind == "dora" and entry.scale == 1:
        factors = {"lora_down.weight": t["down"], "lora_up.weight": t["up"], "dora_scale": t["magnitude"][:, None]}
        return factors | _alpha(len(t["down"]))
    if entry.kind == "output_blocks" and entry.scale == 1 and (upper := _skew_of(t["blocks"])) is not None:
        return {"oft_blocks": upper}
    return {"diff": dense_of(entry, path, weight_of)}


def _skew_of(blocks: Tensor) -> Tensor | None:
    """The upper triangles of Q, by whose Cayley transform R blocks R^T - I are made; None where they are no rotations.

    Blocks of LyCORIS with `rescale` scale the outputs, too, and are none.
    """
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    rotation = blocks.transpose(1, 2) + eye
    if not torch.allclose(rotation @ rotation.transpose(1, 2), eye.expand_as(rotation), rtol=0, atol=1e-5):
        return None
    solved, info = torch.linalg.solve_ex(rotation + eye, rotation - eye, left=False)
    return None if bool(info.any()) else solved.triu(1)


def _alpha(value: float) -> dict[str, Tensor]:
    """An alpha of 0 means the rank there, so that a scale of 0 is written as the next best."""
    return {"alpha": torch.tensor(float(value) or 1e-30)}
