"""What is checked before a model is quantized: what would go wrong later, and what would stay as it is in silence.

Design choices
- Errors come before anything is changed: a model is quantized in place.
- Weights that are no linear layers (transformers' `Conv1D`, experts as one 3-D parameter) are not quantized. They are
  listed in the report, and a warning says how much of the model they are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear
from mm.layers.sites import Site
from mm.layers.surgery import linears, no_branches

SMALLEST = 64  # of both sides of a matrix, for it to count as weights that could have been quantized


def check_model(name: str, root: nn.Module) -> None:
    """Raises UserError where a part carries what cannot be quantized with it.

    Args:
        name: the part's name, for the message.
        root: a 16-bit model.
    """
    if wrapped := sorted(_peft_adapters(root)):
        raise UserError(
            f"{name} ({type(root).__name__}) has adapters attached by peft ({', '.join(wrapped)}): quantized in that "
            "state it could never be loaded again. Take them off (pipe.unload_lora_weights()) and put them onto the "
            "4-bit model, or make them part of the weights first (pipe.fuse_lora(); pipe.unload_lora_weights())"
        )
    if wrapped := [path for path, m in root.named_modules() if type(m).__name__ == "OptimizedModule"]:
        raise UserError(
            f"{name} ({type(root).__name__}) holds parts that torch.compile wraps ({wrapped[0]}): quantized in that "
            "state it could never be loaded again. Load it anew and compile it after quantizing; "
            "compile_repeated_blocks() wraps nothing"
        )
    if fused := [path for path, m in root.named_modules() if getattr(m, "fused_projections", False)]:
        raise UserError(
            f"{name} ({type(root).__name__}) has fused projections ({fused[0]}): its to_q, to_k and to_v are copies "
            "that nothing uses. Call unfuse_qkv_projections() first"
        )


def warn_of_keep(roots: Mapping[str, nn.Module], keep: Sequence[str]) -> None:
    """Warns of patterns that no linear layer of the parts matches: they would have no effect."""
    paths = [path for root in roots.values() for path, _ in linears(root)]
    if lost := [pattern for pattern in keep if not any(re.search(pattern, path) for path in paths)]:
        warnings.warn(
            f"keep holds {', '.join(map(repr, lost))}, which no linear layer of {', '.join(roots)} matches; paths are "
            f"such as {', '.join(paths[:2]) or 'none'}",
            stacklevel=3,
        )


def check_weights(name: str, root: nn.Module, sites: Sequence[Site]) -> None:
    """Raises UserError where a weight that will be quantized is none of 16 or 32 bits, or holds NaN or infinity."""
    for site in sites:
        layer = root.get_submodule(site.path)
        if why := no_branches(layer):
            raise UserError(
                f"{name}.{site.path} is {why}; torch's own linear layers with weights of 16 or 32 bits are quantized: "
                "load the model so, without another program's quantization or casts"
            )
        assert isinstance(layer, nn.Linear)
        if layer.weight.device.type != "meta" and not bool(layer.weight.isfinite().all()):
            wrong = int((~layer.weight.isfinite()).sum())
            raise UserError(
                f"{name}.{site.path}: {wrong} of {layer.weight.numel()} weights are NaN or infinite; the model is "
                "damaged, copy or save it again"
            )


def why_none(name: str, root: nn.Module) -> str:
    """Why a part has no layer to quantize."""
    kind = type(root).__name__
    done = sum(isinstance(m, BranchedLinear) and m.bits != 16 for m in root.modules())
    if done:
        return f"{name} ({kind}) is quantized already ({done} layers); quantize the 16-bit model again instead"
    if others := [f"{path} ({why})" for path, why, _ in untouched(root)]:
        return f"{name} ({kind}): its weights are no linear layers that could be quantized: {', '.join(others[:3])}"
    count = sum(1 for _ in linears(root))
    return f"{name} ({kind}) has {count} linear layers, and all of them stay at 16 bits: there is nothing to quantize"


def _peft_adapters(root: nn.Module) -> set[str]:
    found: set[str] = set()
    module: Any
    for module in root.modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            found |= {str(name) for name in module.active_adapters} or {"unnamed"}
    return found


def untouched(root: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Path, kind and number of weights of what holds matrices, and is no linear layer."""
    for path, module in root.named_modules():
        if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), nn.Parameter):
            yield path, "Conv1D of transformers", module.weight.numel()
            continue
        if type(module).__module__.startswith("torch.nn"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape[1:]) >= SMALLEST and parameter.shape[0] > 1:
                yield f"{path}.{name}".lstrip("."), "one 3-D parameter, as mixtures of experts have", parameter.numel()


def warn_untouched(roots: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Warns of weights that stay as they are because of their kind; returns them for the report."""
    found: list[dict[str, Any]] = []
    for name, root in roots.items():
        rows: list[dict[str, Any]] = [
            {"path": f"{name}.{path}", "kind": kind, "weights": size} for path, kind, size in untouched(root)
        ]
        if rows:
            total = sum(p.numel() for p in root.parameters())
            share = sum(row["weights"] for row in rows) / max(total, 1)
            kinds = ", ".join(sorted({row["kind"] for row in rows}))
            warnings.warn(
                f"{name}: {share:.0%} of the weights stay at 16 bits, since they are {kinds}: {rows[0]['path']}"
                f"{' and others' if len(rows) > 1 else ''}",
                stacklevel=3,
            )
        found += rows
    return found


def warn_adapters(roots: Mapping[str, nn.Module]) -> list[str]:
    """Warns of adapters that are attached as branches; returns their names for the report."""
    names = {b.name for r in roots.values() for m in r.modules() if isinstance(m, BranchedLinear) for b in m.branches}
    if names:
        warnings.warn(
            f"the adapters {', '.join(sorted(names))} stay attached, as branches over the quantized layers; saving the "
            "model does not save them. Bake them first to make them part of the weights",
            stacklevel=3,
        )
    return sorted(names)


def bytes_of(root: nn.Module) -> int:
    """Bytes of a model's tensors as they are stored: parameters, and buffers that are saved."""
    return sum(t.numel() * t.element_size() for t in root.state_dict().values() if torch.is_tensor(t))
