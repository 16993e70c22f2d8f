"""What peft's tuners of whole weights have learned at a layer, as the factors that an entry holds.

Design choices
- Factors are kept in half precision, as those of LoRA are. DoRA's magnitudes stay in fp32: they stand for the whole
  weight, of which the change is a small part.

Legend: N outputs, K inputs, r rank, n values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mm.adapters.entry import Entry

ADAPTER = "mm_training"  # peft's name of what is trained


def _half(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().half().contiguous()


def _dora(layer: Any) -> Entry:
    up = layer.scaling[ADAPTER] * layer.lora_B[ADAPTER].weight
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight.detach().cpu().float().flatten().clone()
    tensors = {"down": _half(layer.lora_A[ADAPTER].weight), "up": _half(up), "magnitude": magnitude}
    return Entry(kind="dora", tensors=tensors)


def _loha(layer: Any) -> Entry:
    tensors = {part: _half(getattr(layer, f"hada_{part}")[ADAPTER]) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    return Entry(kind="hadamard", tensors=tensors, scale=float(layer.scaling[ADAPTER]))


def _lokr(layer: Any) -> Entry:
    whole = ADAPTER in layer.lokr_w1
    first = layer.lokr_w1[ADAPTER] if whole else layer.lokr_w1_a[ADAPTER] @ layer.lokr_w1_b[ADAPTER]
    scale = float(layer.scaling[ADAPTER])
    if ADAPTER in layer.lokr_w2:
        tensors = {"first": _half(first), "second": _half(layer.lokr_w2[ADAPTER])}
        return Entry(kind="kron", tensors=tensors, scale=scale)
    up, down = layer.lokr_w2_a[ADAPTER], layer.lokr_w2_b[ADAPTER]
    return Entry(
        kind="kron_product", tensors={"first": _half(first), "up": _half(up), "down": _half(down)}, scale=scale
    )


def _oft(layer: Any) -> Entry:
    module = layer.oft_R[ADAPTER]
    terms = int(module.num_cayley_neumann_terms) if module.use_cayley_neumann else 0
    return Entry(kind="oft", tensors={"skew": _half(module.weight), "terms": torch.tensor([terms])})


def _shira(layer: Any) -> Entry:
    rows, columns = layer.shira_indices[ADAPTER].cpu().long()
    size = torch.tensor([layer.out_features, layer.in_features])
    values = layer.shira_weight[ADAPTER].detach().cpu().half().flatten().clone()
    indices = (rows * layer.in_features + columns).to(torch.int32)
    tensors = {"indices": indices, "values": values, "size": size}
    return Entry(kind="sparse", tensors=tensors, scale=float(layer.scaling[ADAPTER]))


FACTORS: Mapping[str, Callable[[Any], Entry]] = {
    "dora": _dora, "loha": _loha, "lokr": _lokr, "oft": _oft, "shira": _shira,
}  # fmt: skip
