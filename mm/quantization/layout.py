"""Which layers of a saved model are quantized, and how: what `quantization_config` says beside the settings.

Design choices
- The tensors of a quantized layer are its state_dict (see `mm.layers.linear`), row-major and the same on every device.
  What tensors do not contain (rank and shapes before they are loaded, how inputs are rounded) stands in config.json,
  layers of one kind together.
- A model that was quantized carries the hash of its 16-bit tensors, by which patches know their base.
- How diffusers and transformers save that is registered here by `mm.quantization.integrations`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mm.core.errors import UserError
from mm.core.nouns import with_article
from mm.layers.base_hash import base_hash as base_hash
from mm.layers.linear import BranchedLinear
from mm.layers.surgery import swap
from mm.quantization.config import SVDQuantConfig
from mm.quantization.library_calls import set_calls
from mm.quantization.saved_layers import saved_kinds

Recorder = Callable[[Any, SVDQuantConfig], None]
ALIGNMENT = 64  # bytes, as torch allocates
_recorders: dict[str, Recorder] = {}


def add_recorder(library: str, recorder: Recorder) -> None:
    """Registers how models of a library keep a quantization config, so that they save and load with it."""
    _recorders[library] = recorder


def quantized(root: nn.Module) -> list[tuple[str, BranchedLinear]]:
    """The quantized layers by path."""
    return [(n, m) for n, m in root.named_modules() if isinstance(m, BranchedLinear) and m.bits != 16]


def describe(root: nn.Module) -> tuple[dict[str, Any], ...]:
    """Kinds of quantized layers, JSON-ready: settings, and the paths that have them."""
    kinds: dict[str, dict[str, Any]] = {}
    for path, layer in quantized(root):
        kind = {
            "bits": layer.bits,
            "rank": 0 if layer.down is None else layer.down.shape[0],
            "smooth": layer.smooth is not None,
            "bias": layer.bias is not None,
            "activation": dataclasses.asdict(layer.activation),
        }
        key = json.dumps(kind, sort_keys=True)
        kinds.setdefault(key, kind | {"paths": []})["paths"].append(path)
    return tuple(kinds.values())


def prepare(root: nn.Module, kinds: Sequence[dict[str, Any]], dtype: torch.dtype | None) -> None:
    """Puts empty quantized layers in place, ready for their tensors. Raises UserError where a path does not fit."""
    for kind in saved_kinds(kinds):
        for path in kind.paths:
            try:
                layer = root.get_submodule(path)
            except AttributeError as error:
                raise UserError(
                    f"the saved model quantizes {path}, which {type(root).__name__} does not have"
                ) from error
            if not isinstance(layer, nn.Linear):
                raise UserError(f"the saved model quantizes {path}, which is {with_article(type(layer).__name__)} here")
            made = BranchedLinear.empty(
                layer.in_features, layer.out_features, bias=kind.bias, bits=kind.bits, rank=kind.rank,
                smooth=kind.smooth, dtype=dtype or layer.weight.dtype, activation=kind.activation,
                device=layer.weight.device,
            )  # fmt: skip
            swap(root, path, made.requires_grad_(False).train(layer.training))


def ready(root: nn.Module) -> None:
    """After a model was loaded: lays branches side by side, and aligns what a file has left unaligned."""
    align(root)
    for _, layer in quantized(root):
        layer.refresh()
    set_calls(root)


def align(root: nn.Module) -> None:
    """Copies tensors on the CPU that do not begin at a multiple of 64 bytes, as those mapped from a file.

    torch's products of fp32 matrices differ in the last bit with the alignment, and a model is to give the same outputs
    before saving and after loading.
    """
    for tensor in (*root.parameters(), *root.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def record(root: Any, config: SVDQuantConfig, base: str) -> None:
    """Writes what was done where the library that saves `root` reads it.

    Args:
        root: the quantized model; a plain module keeps only the hash of its base.
        config: the settings it was quantized with.
        base: hash of its 16-bit tensors.
    """
    root.mm_base_hash = base
    set_calls(root)
    saves = "diffusers" if hasattr(root, "register_to_config") else "transformers"
    if hasattr(root, "config") and hasattr(root, "save_pretrained") and saves in _recorders:
        _recorders[saves](root, dataclasses.replace(config, layers=describe(root), base=base))
