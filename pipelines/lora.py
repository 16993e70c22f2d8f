"""LoRA on the trunk: load, scale, take off. What does not match raises; nothing loads silently without effect.

Design choices
- Files are in peft's / diffusers' layout: keys `trunk.<module>.lora_A.weight` and `lora_B.weight` (the prefix may be
  missing). peft injects them through diffusers' `PeftAdapterMixin`.
- Before anything is injected every key is matched against the trunk's linears, with shapes. The error names the first
  that do not fit and says "N of M tensors match".
- How strongly an adapter acts (alpha / rank) is not in its tensors. It is written where diffusers keeps it, in the
  file's metadata, for every layer; a file without it acts at full strength, as in diffusers.
- diffusers' own `LoraBaseMixin` is not inherited: it costs every cold start a third of a second, for text encoders.

This module does not know how adapters are trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mm.errors import UserError
from mm.files import write_bytes

if TYPE_CHECKING:
    from mm.models.trunk import Trunk

_FILE = "pytorch_lora_weights.safetensors"
_SETTINGS = "lora_adapter_metadata"  # diffusers' key in a file's metadata
_PREFIXES = ("transformer.", "trunk.")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Tensors by the trunk's module names, and the settings that came with them (empty when there were none)."""

    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]

    def ranks(self) -> dict[str, int]:
        """The rank of every layer."""
        end = ".lora_A.weight"
        return {name.removesuffix(end): t.shape[0] for name, t in self.tensors.items() if name.endswith(end)}

    def alphas(self) -> dict[str, float]:
        """Alpha of every layer, such that it acts with alpha / rank."""
        from peft.utils.other import get_pattern_key

        pattern, default = self.settings.get("alpha_pattern") or {}, self.settings.get("lora_alpha")
        found = {}
        for name, rank in self.ranks().items():
            alpha = pattern.get(get_pattern_key(list(pattern), name), default)
            root = math.sqrt(rank) if self.settings.get("use_rslora") else 1.0
            found[name] = rank if alpha is None else float(alpha) * root
        return found


def read_lora(source: str | Path | Mapping[str, torch.Tensor], weight_name: str = _FILE) -> Lora:
    """A LoRA from a file, from `weight_name` in a folder, or from a dict of tensors."""
    if isinstance(source, Mapping):
        return Lora(tensors={_bare(name): t for name, t in source.items()}, settings={})
    path = Path(source)
    path = path / weight_name if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no LoRA at {path}; give a .safetensors file or a folder holding {weight_name}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {_bare(name): file.get_tensor(name) for name in file.keys()}
            settings = json.loads((file.metadata() or {}).get(_SETTINGS, "{}"))
            return Lora(tensors=tensors, settings={_bare(name): value for name, value in settings.items()})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); pickled adapters are not read") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its {_SETTINGS} cannot be read ({error}); save the adapter again") from error


def _bare(name: str) -> str:
    """A name without the component it belongs to."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def check_match(tensors: Mapping[str, torch.Tensor], trunk: Trunk) -> None:
    """Raises UserError unless every tensor is half of a pair that fits a linear of the trunk."""
    # Where an adapter is loaded already, peft keeps the trunk's own linear as `base_layer`.
    linears = {
        name.removesuffix(".base_layer"): m
        for name, m in trunk.named_modules()
        if isinstance(m, torch.nn.Linear) and ".lora_" not in name
    }
    bad = [name for name, tensor in tensors.items() if not _fits(name, tensor, linears, tensors)]
    if bad or not tensors:
        shown = ", ".join(bad[:3]) or "the file is empty"
        raise UserError(f"{len(tensors) - len(bad)} of {len(tensors)} LoRA tensors match this trunk; not: {shown}")


def _fits(
    name: str, tensor: torch.Tensor, linears: Mapping[str, torch.nn.Linear], tensors: Mapping[str, torch.Tensor]
) -> bool:
    for mine, other, side in ((".lora_A.weight", ".lora_B.weight", 1), (".lora_B.weight", ".lora_A.weight", 0)):
        if name.endswith(mine):
            linear, pair = linears.get(name.removesuffix(mine)), tensors.get(name.removesuffix(mine) + other)
            return (
                linear is not None
                and pair is not None
                and tensor.ndim == 2
                and tensor.shape[side] == linear.weight.shape[side]
                and tensor.shape[1 - side] == pair.shape[side]
            )
    return False


class TrunkLoraMixin:
    """diffusers' adapter calls for a pipeline whose trunk takes LoRA."""

    trunk: Trunk

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, torch.Tensor],
        adapter_name: str = "default",
        *,
        weight_name: str = _FILE,
    ) -> None:
        """Loads a LoRA and makes it the active one. Raises UserError when any tensor does not match."""
        from peft import LoraConfig

        if not adapter_name or "." in adapter_name:
            raise UserError(f"adapter_name is {adapter_name!r}; give a name without dots")
        if adapter_name in self._loaded():
            raise UserError(f"an adapter {adapter_name!r} is loaded already; unload it or choose another adapter_name")
        lora = read_lora(source, weight_name)
        check_match(lora.tensors, self.trunk)
        ranks, alphas = lora.ranks(), lora.alphas()
        rank = next(iter(ranks.values()))
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,  # of no layer: the patterns name them all
            rank_pattern=dict(ranks),
            alpha_pattern=dict(alphas),
            target_modules=list(ranks),
            init_lora_weights=False,
        )
        self.trunk.add_adapter(config, adapter_name=adapter_name)
        parameters = dict(self.trunk.named_parameters())
        for name, tensor in lora.tensors.items():
            parameters[name.replace(".weight", f".{adapter_name}.weight")].data.copy_(tensor)

    def save_lora_weights(self, folder: str | Path, adapter_name: str = "default", *, weight_name: str = _FILE) -> Path:
        """Writes an adapter with its settings to `weight_name` in `folder`."""
        self._known([adapter_name])
        mark = f".{adapter_name}.weight"
        found = {n: p for n, p in self.trunk.named_parameters() if ".lora_" in n and n.endswith(mark)}
        tensors = {f"trunk.{n.removesuffix(mark)}.weight": p.detach().contiguous() for n, p in found.items()}
        settings = {f"trunk.{key}": value for key, value in self._settings(adapter_name).items()}
        path = Path(folder) / weight_name
        write_bytes(path, save(tensors, metadata={"format": "pt", _SETTINGS: json.dumps(settings, sort_keys=True)}))
        return path

    def _settings(self, adapter_name: str) -> dict[str, Any]:
        """What of an adapter's peft config its tensors do not tell, layer by layer."""
        layers = {name: m for name, m in self._lora_layers().items() if adapter_name in m.lora_A}
        ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
        alphas = {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
        config: Any = self.trunk.peft_config[adapter_name]
        if config.use_rslora:  # acts with alpha / sqrt(rank); told as alpha / rank
            alphas = {name: alpha * math.sqrt(ranks[name]) for name, alpha in alphas.items()}
        return {
            "r": next(iter(ranks.values())),
            "lora_alpha": next(iter(alphas.values())),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "target_modules": sorted(ranks),
        }

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Activates adapters, each with its weight (1 by default)."""
        chosen = self._known(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else adapter_weights
        if isinstance(weights, list) and len(weights) != len(chosen):
            raise UserError(f"{len(weights)} adapter_weights for {len(chosen)} adapters; give one for each")
        self.trunk.set_adapters(chosen, weights)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters off for good; the others stay."""
        self.trunk.delete_adapters(self._known(adapter_names))

    def disable_lora(self) -> None:
        """Switches all adapters off without taking them off."""
        self._known([])
        self.trunk.disable_lora()

    def enable_lora(self) -> None:
        """Switches the active adapters on again."""
        self._known([])
        self.trunk.enable_lora()

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of the loaded adapters by component, active or not."""
        return {"trunk": self._loaded()} if self._loaded() else {}

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.trunk.active_adapters()) if getattr(self.trunk, "peft_config", None) else []

    def unload_lora_weights(self) -> None:
        """Takes all adapters off; the trunk is as it was."""
        if getattr(self.trunk, "peft_config", None):
            self.trunk.unload_lora()

    def fuse_lora(self, *, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Adds adapters to the weights: those named, or the active ones."""
        chosen = self._known(adapter_names or [])
        self.trunk.fuse_lora(lora_scale, adapter_names=chosen or None)

    def unfuse_lora(self) -> None:
        """Takes fused adapters out of the weights again."""
        self.trunk.unfuse_lora()

    @contextmanager
    def scaled_lora(self, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """Scales active adapters by `attention_kwargs["scale"]` for one call."""
        given = dict(attention_kwargs or {})
        scale = float(given.pop("scale", 1.0))
        if given:
            raise UserError(f"unknown attention_kwargs {sorted(given)}; known: scale")
        if scale == 1.0:
            yield
            return
        from diffusers.utils.peft_utils import scale_lora_layers

        self._known([])
        # Kept and put back: dividing the scale out again would round, and forget the adapters' weights after scale 0.
        kept = [(m, dict(m.scaling)) for m in self._lora_layers().values()]
        scale_lora_layers(self.trunk, scale)
        try:
            yield
        finally:
            for layer, scaling in kept:
                layer.scaling.update(scaling)

    def _lora_layers(self) -> dict[str, Any]:
        return {name: m for name, m in self.trunk.named_modules() if hasattr(m, "lora_A")}

    def _loaded(self) -> list[str]:
        return list(getattr(self.trunk, "peft_config", None) or {})

    def _known(self, names: str | Sequence[str]) -> list[str]:
        """The names as a list. Raises UserError when one of them, or any adapter at all, is not loaded."""
        chosen, loaded = [names] if isinstance(names, str) else list(names), self._loaded()
        missing = [name for name in chosen if name not in loaded]
        if missing or not loaded:
            what = f"no adapter {missing[0]!r}" if missing else "no adapter"
            raise UserError(f"{what} is loaded; loaded: {', '.join(loaded) or 'none'}")
        return chosen
