"""All spellings of a model's layers: its own paths, and the names of other programs that stand for them.

Facts: `family_names`; latent diffusion numbers a UNet's blocks in one row, in the order in which they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from mm.adapters.formats.family_names import CLIP_ATTENTION, FUSED, LDM_ENDS, LDM_RESNET, TABLES
from mm.layers.surgery import clean, submodule


def layer_paths(root: nn.Module) -> Iterator[str]:
    """Paths of modules with a weight, an adapter's own left out, and those that projections were fused from."""
    for path, module in root.named_modules():
        if re.search(r"\.lora_[AB]\.|lora_magnitude|\.lokr_|\.hada_|\.oft_R", path):
            continue
        if isinstance(module, nn.Linear) or module._parameters.get("weight") is not None:
            yield clean(path)
        if getattr(module, "fused_projections", False):
            for fused, parts in FUSED.items():
                if isinstance(getattr(module, fused, None), nn.Module):
                    yield from (f"{clean(path)}.{part}".strip(".") for part in parts)


def foreign_names(root: nn.Module, own: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Other programs' names, each with what it stands for; only where the model has all of that."""
    kinds = [kind.__name__ for kind in type(root).__mro__]
    if "UNet2DConditionModel" in kinds:
        yield from _ldm(root, own)
    if any(kind.startswith("CLIPText") for kind in kinds):
        yield from _clip(own)
    for kind in kinds:
        for (theirs, ours), layers in TABLES.get(kind, {}).items():
            for number in range(_blocks(root, ours)):
                for name, spec in layers.items():
                    full = _filled(spec, ours.format(number))
                    if all(path in own for path in full.removeprefix("~").split("|")):
                        yield f"{theirs.format(number)}.{name}".strip("."), _last_context(root, full, own)
    for path in own:
        parent, _, leaf = path.rpartition(".")
        for fused, parts in FUSED.items():
            name = f"{parent}.{fused}".strip(".")
            if leaf == parts[0] and name not in own and all(f"{parent}.{p}".strip(".") in own for p in parts):
                yield name, "|".join(f"{parent}.{p}".strip(".") for p in parts)


def _filled(spec: str, block: str) -> str:
    swap = "~" if spec.startswith("~") else ""
    return swap + "|".join(f"{block}.{part}".strip(".") for part in spec.removeprefix("~").split("|"))


def _blocks(root: nn.Module, ours: str) -> int:
    if not ours:
        return 1
    parent = submodule(root, ours.partition(".{}")[0])
    return 0 if parent is None else len(list(parent.children()))


def _last_context(root: nn.Module, spec: str, own: dict[str, str]) -> str:
    """SD3's last block modulates its text by shift and scale only, in the other order."""
    if not spec.endswith("norm1_context.linear"):
        return spec
    layer = submodule(root, spec)
    continuous = isinstance(layer, nn.Linear) and layer.out_features == 2 * layer.in_features
    return f"~{spec}" if continuous else spec


def _clip(own: dict[str, str]) -> Iterator[tuple[str, str]]:
    """CLIP with and without the level `text_model`, which transformers 5 dropped; diffusers' early attention names."""
    for path in own:
        bare = path.removeprefix("text_model.")
        other = f"text_model.{bare}" if bare == path else bare
        yield other, path
        for theirs, ours in CLIP_ATTENTION.items():
            if bare.endswith(f"self_attn.{ours}"):
                for name in (path, other):
                    yield name.removesuffix(ours) + theirs, path


def _ldm(root: nn.Module, own: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The names of latent diffusion's UNet, numbered by counting this model's blocks."""
    found = dict(LDM_ENDS)
    for theirs, ours in _ldm_blocks(root):
        for path in own:
            if path.startswith(f"{ours}.") or path == ours:
                below = path.removeprefix(ours).strip(".")
                inner = next((k for k, v in LDM_RESNET.items() if v == below and "resnets" in ours), below)
                found[f"{theirs}.{inner}".strip(".")] = path
    yield from ((name, path) for name, path in found.items() if path in own)


def _ldm_blocks(root: Any) -> Iterator[tuple[str, str]]:
    number = 1
    for b, block in enumerate(root.down_blocks):
        for j in range(len(block.resnets)):
            yield f"input_blocks.{number}.0", f"down_blocks.{b}.resnets.{j}"
            yield f"input_blocks.{number}.1", f"down_blocks.{b}.attentions.{j}"
            number += 1
        if getattr(block, "downsamplers", None):
            yield f"input_blocks.{number}.0.op", f"down_blocks.{b}.downsamplers.0.conv"
            number += 1
    for number, ours in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{number}", f"mid_block.{ours}"
    number = 0
    for b, block in enumerate(root.up_blocks):
        for j in range(len(block.resnets)):
            yield f"output_blocks.{number}.0", f"up_blocks.{b}.resnets.{j}"
            yield f"output_blocks.{number}.1", f"up_blocks.{b}.attentions.{j}"
            if j == len(block.resnets) - 1 and getattr(block, "upsamplers", None):
                place = 2 if getattr(block, "attentions", None) else 1
                yield f"output_blocks.{number}.{place}.conv", f"up_blocks.{b}.upsamplers.0.conv"
            number += 1
