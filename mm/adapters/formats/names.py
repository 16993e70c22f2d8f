"""Which layers of a model a name in a LoRA file stands for.

Design choices
- Names are resolved against the model at hand: its own paths, other programs' names for them (`family_names`), and both
  with underscores for dots, as kohya's scripts and LyCORIS flatten them.
- A name stands for one or more pieces: rows of layers, in the order of the file's rows. So one LoRA on a fused qkv goes
  onto q, k and v, and one on q goes onto the first rows of a model whose projections are fused.
- A prefix says which part of a pipeline is meant: those of the family first (`mm.families`), then general ones. Without
  one, the denoiser is; a text encoder only where no other part has a layer of that name.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mm.adapters.formats.family_names import FUSED
from mm.adapters.formats.spellings import foreign_names, layer_paths
from mm.core.errors import UserError
from mm.families import family_of
from mm.layers.surgery import roots_of, submodule

DENOISERS: tuple[str, ...] = tuple("transformer unet trunk prior decoder".split())
_DENOISER = ("lora_unet_", "oft_unet_", "lora_transformer_", "lycoris_", "unet.", "transformer.",
             "model.diffusion_model.", "diffusion_model.")  # fmt: skip
PREFIXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_DENOISER, DENOISERS),
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
        family = None if isinstance(target, nn.Module) else family_of(target)
        own: dict[str, str] = {}
        if family is not None and family.lora is not None:
            own = {f"{prefix}.": c for prefix, c in family.lora.components.items()} | dict(family.lora.kohya)
        self._prefixes: dict[str, tuple[str, ...]] = {prefix: (component,) for prefix, component in own.items()}
        for prefix, components in PREFIXES.items():
            self._prefixes[prefix] = (*self._prefixes.get(prefix, ()), *components)

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
            for component in self._prefixes.get(prefix, ()):
                if component in self._parts and self._parts[component].has(module.removeprefix(prefix)):
                    return self._parts[component].pieces(module.removeprefix(prefix), component)
        return self._without_prefix(module)

    def original_names(self, component: str) -> tuple[str, ...]:
        """Other programs' names for a component's layers, those of whole blocks of the original code first."""
        return self._parts[component].foreign

    def _prefixes_of(self, module: str) -> list[str]:
        parts = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "transformer_2.", "trunk.", "prior.")
        return [prefix for prefix in (*self._prefixes, *parts) if module.startswith(prefix)]

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
        own = {path: path for path in layer_paths(root)}
        names = dict(foreign_names(root, own))
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
    layers = [layer for part in parts if isinstance(layer := getattr(owner, part, None), nn.Module)]
    if len(layers) == len(parts):
        return [outputs(layer) for layer in layers]
    return [outputs(fused) // len(parts)] * len(parts)
