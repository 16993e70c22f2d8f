"""LoRA on the trunk: load, scale, take off. What does not match raises; nothing loads silently without effect.

Design choices
- Files are in peft's / diffusers' layout: keys `trunk.<module>.lora_A.weight` and `lora_B.weight` (the prefix may be
  missing). peft injects them through diffusers' `PeftAdapterMixin`.
- Before anything is injected every key is matched against the trunk's linears, with shapes. The error names the first
  that do not fit and says "N of M tensors match".

This module does not know how adapters are trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from mm.errors import UserError
from mm.files import write_bytes

if TYPE_CHECKING:
    from mm.models.trunk import Trunk

_FILE = "pytorch_lora_weights.safetensors"


def read_lora(source: str | Path | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA file, folder or dict, without the `trunk.` prefix."""
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        path = Path(source)
        path = path / _FILE if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"no LoRA at {path}; give a .safetensors file or a folder holding {_FILE}")
        try:
            tensors = load_file(path)
        except Exception as error:
            raise UserError(f"{path} is no safetensors file ({error}); pickled adapters are not read") from error
    return {name.removeprefix("transformer.").removeprefix("trunk."): t for name, t in tensors.items()}


def check_match(tensors: Mapping[str, torch.Tensor], trunk: Trunk) -> None:
    """Raises UserError unless every tensor is half of a pair that fits a linear of the trunk."""
    linears = {name: m for name, m in trunk.named_modules() if isinstance(m, torch.nn.Linear)}
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
        self, source: str | Path | Mapping[str, torch.Tensor], adapter_name: str = "default", **_: Any
    ) -> None:
        """Loads a LoRA and makes it active. Raises UserError when any tensor does not match."""
        from peft import LoraConfig

        tensors = read_lora(source)
        check_match(tensors, self.trunk)
        ranks = {
            n.removesuffix(".lora_A.weight"): t.shape[0] for n, t in tensors.items() if n.endswith(".lora_A.weight")
        }
        if adapter_name in getattr(self.trunk, "peft_config", {}):
            raise UserError(f"an adapter {adapter_name!r} is loaded already; unload it or choose another adapter_name")
        rank = next(iter(ranks.values()))
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            rank_pattern=dict(ranks),
            alpha_pattern=dict(ranks),
            target_modules=list(ranks),
            init_lora_weights=False,
        )
        self.trunk.add_adapter(config, adapter_name=adapter_name)
        loaded = 0
        parameters = dict(self.trunk.named_parameters())
        for name, tensor in tensors.items():
            parameter = parameters[name.replace(".weight", f".{adapter_name}.weight")]
            parameter.data.copy_(tensor)
            loaded += 1
        assert loaded == len(tensors)

    def save_lora_weights(self, folder: str | Path, adapter_name: str = "default") -> Path:
        """Writes an adapter to `folder`/pytorch_lora_weights.safetensors."""
        self._known([adapter_name])
        mark = f".{adapter_name}.weight"
        found = {n: p for n, p in self.trunk.named_parameters() if ".lora_" in n and n.endswith(mark)}
        tensors = {f"trunk.{n.removesuffix(mark)}.weight": p.detach().contiguous() for n, p in found.items()}
        path = Path(folder) / _FILE
        write_bytes(path, save(tensors, metadata={"format": "pt"}))
        return path

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Activates adapters, each with its weight (1 by default)."""
        chosen = [names] if isinstance(names, str) else list(names)
        self._known(chosen)
        self.trunk.set_adapters(chosen, list(weights) if isinstance(weights, Sequence) else weights)

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.trunk.active_adapters()) if getattr(self.trunk, "peft_config", None) else []

    def unload_lora_weights(self) -> None:
        """Takes all adapters off; the trunk is as it was."""
        if getattr(self.trunk, "peft_config", None):
            self.trunk.unload_lora()

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Adds the active adapters to the weights."""
        self._known([])
        self.trunk.fuse_lora(lora_scale)

    def unfuse_lora(self) -> None:
        """Takes fused adapters out of the weights again."""
        self.trunk.unfuse_lora()

    @contextmanager
    def lora_scale(self, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """Scales active adapters by `attention_kwargs["scale"]` for one call."""
        given = dict(attention_kwargs or {})
        scale = float(given.pop("scale", 1.0))
        if given:
            raise UserError(f"unknown attention_kwargs {sorted(given)}; known: scale")
        if scale == 1.0:
            yield
            return
        from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

        self._known([])
        scale_lora_layers(self.trunk, scale)
        try:
            yield
        finally:
            unscale_lora_layers(self.trunk, scale)

    def _known(self, names: Sequence[str]) -> None:
        loaded = list(getattr(self.trunk, "peft_config", None) or {})
        missing = [name for name in names if name not in loaded]
        if missing or not loaded:
            what = f"no adapter {missing[0]!r}" if missing else "no adapter"
            raise UserError(f"{what} is loaded; loaded: {', '.join(loaded) or 'none'}")
