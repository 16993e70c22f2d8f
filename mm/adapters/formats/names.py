"""Which layers of a model a name in a LoRA file stands for.

Design choices
- Names are resolved against the model at hand: its own paths, other programs' names for them (`family_names`), and both
  with underscores for dots, as kohya's scripts and LyCORIS flatten them.
- A name stands for one or more pieces: rows of layers, in the order of the file's rows. So one LoRA on a fused qkv goes
  onto q, k and v, and one on q goes onto the first rows of a model whose projections are fused.
- A prefix says which part of a pipeline is meant. Without one, the denoiser is; a text encoder only where no other part
  has a layer of that name.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mm.adapters.formats.family_names import CLIP_ATTENTION, FUSED, LDM_ENDS, LDM_RESNET, TABLES
from mm.core.errors import UserError
from mm.layers.surgery import clean, roots_of, submodule

DENOISERS = ("transformer", "unet", "trunk", "prior", "decoder")
_DENOISER = ("lora_unet_", "lora_transformer_", "lycoris_", "unet.", "transformer.", "model.diffusion_model.",
             "diffusion_model.")  # fmt: skip
PREFIXES: dict[str, tuple[str, ...]] = dict.fromkeys(_DENOISER, DENOISERS) | {
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "text_encoder_2"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Rows of one layer: `count` of them from `start` on, which are the file's rows from `source` on."""

    path: str
    layer: nn.Module
    start: int
    count: int
    source: int


class Names:
    """The names of a module's or a pipeline's layers, in all spellings."""

    def __init__(self, target: Any) -> None:
        self._parts = {name: _Part(root) for name, root in roots_of(target).items()}

    def find(self, module: str) -> tuple[Piece, ...] | None:
        """The pieces that a name stands for; None where the model has no such layer.

        Raises:
            UserError: where a name without a prefix is in several text encoders.
        """
        if "" in self._parts:
            names = [module, *(module.removeprefix(p) for p in self._prefixes_of(module))]
            return next((self._parts[""].pieces(n, "") for n in names if self._parts[""].has(n)), None)
        for component, part in self._parts.items():
            if module.startswith(f"{component}.") and part.has(module.removeprefix(f"{component}.")):
                return part.pieces(module.removeprefix(f"{component}."), component)
        for prefix in self._prefixes_of(module):
            for component in PREFIXES.get(prefix, ()):
                if component in self._parts and self._parts[component].has(module.removeprefix(prefix)):
                    return self._parts[component].pieces(module.removeprefix(prefix), component)
        return self._without_prefix(module)

    def original_names(self, component: str) -> tuple[str, ...]:
        """Other programs' names for a component's layers, those of whole blocks of the original code first."""
        return self._parts[component].foreign

    def _prefixes_of(self, module: str) -> list[str]:
        parts = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "transformer_2.", "trunk.", "prior.")
        return [prefix for prefix in (*PREFIXES, *parts) if module.startswith(prefix)]

    def _without_prefix(self, module: str) -> tuple[Piece, ...] | None:
        found = [c for c, part in self._parts.items() if part.has(module)]
        denoiser = next((c for c in DENOISERS if c in found), None)
        if denoiser is None and len(found) > 1:
            raise UserError(f"{module} may be a layer of {' or '.join(found)}; the file does not say which")
        return self._parts[denoiser or found[0]].pieces(module, denoiser or found[0]) if found else None


class _Part:
    """The names of one root module's layers."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        own = {path: path for path in _layer_paths(root)}
        names = dict(_foreign(root, own))
        self.foreign = tuple(names)
        for path in own:
            if path.endswith(".to_out.0"):
                names.setdefault(path.removesuffix(".0"), path)
        self._names = names | own
        self._flat: dict[str, str] = {}
        for name, spec in self._names.items():
            flat = name.replace(".", "_")
            self._flat[flat] = spec if self._flat.get(flat, spec) == spec else ""

    def has(self, name: str) -> bool:
        return bool(self._names.get(name) or self._flat.get(name))

    def pieces(self, name: str, component: str) -> tuple[Piece, ...]:
        spec = self._names.get(name) or self._flat[name]
        swapped = spec.startswith("~")
        pieces: list[Piece] = []
        source = 0
        for path in spec.removeprefix("~").split("|"):
            place, layer, start, count = self._rows(path)
            full = f"{component}.{place}".strip(".")
            halves = ((count // 2, count - count // 2), (0, count // 2)) if swapped else ((0, count),)
            for offset, size in halves:
                made = Piece(path=full, layer=layer, start=start + offset, count=size, source=source)
                pieces.append(made)
                source += size
        return tuple(pieces)

    def _rows(self, path: str) -> tuple[str, nn.Module, int, int]:
        """Path, layer, first row and number of rows: of the layer itself, or of the one it was fused into."""
        parent, _, leaf = path.rpartition(".")
        owner = submodule(self.root, parent) if parent else self.root
        for fused, parts in FUSED.items():
            layer = getattr(owner, fused, None)
            if leaf in parts and isinstance(layer, nn.Module) and getattr(owner, "fused_projections", False):
                sizes = _sizes(owner, layer, parts)
                index = parts.index(leaf)
                return f"{parent}.{fused}".strip("."), layer, sum(sizes[:index]), sizes[index]
        layer = submodule(self.root, path)
        assert layer is not None, path
        return path, layer, 0, outputs(layer)


def outputs(layer: nn.Module) -> int:
    """Outputs of a linear layer; else the first size of its weight."""
    return layer.out_features if isinstance(layer, nn.Linear) else int(_weight_of(layer).shape[0])


def _weight_of(layer: nn.Module) -> Any:
    return layer._parameters.get("weight")


def _sizes(owner: Any, fused: nn.Module, parts: tuple[str, ...]) -> list[int]:
    layers = [getattr(owner, part, None) for part in parts]
    if all(isinstance(layer, nn.Module) for layer in layers):
        return [outputs(layer) for layer in layers]
    return [outputs(fused) // len(parts)] * len(parts)


def _layer_paths(root: nn.Module) -> Iterator[str]:
    """Paths of modules with a weight, an adapter's own left out, and those that projections were fused from."""
    for path, module in root.named_modules():
        if re.search(r"\.lora_[AB]\.|lora_magnitude|\.lokr_|\.hada_", path):
            continue
        if isinstance(module, nn.Linear) or _weight_of(module) is not None:
            yield clean(path)
        if getattr(module, "fused_projections", False):
            for fused, parts in FUSED.items():
                if isinstance(getattr(module, fused, None), nn.Module):
                    yield from (f"{clean(path)}.{part}".strip(".") for part in parts)


def _foreign(root: nn.Module, own: dict[str, str]) -> Iterator[tuple[str, str]]:
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
