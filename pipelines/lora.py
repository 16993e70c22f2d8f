"""LoRA on the trunk: load, scale, take off. What does not match raises; nothing loads silently without effect.

Design choices
- An adapter is a patch (`mm.adapters.patch`) whose low-rank entries become live branches of the trunk's linears:
  nothing is injected or wrapped, 16-bit and 4-bit layers take them, and removing them restores the trunk bit for
  bit. Files of peft, diffusers and kohya are read by `mm.adapters.formats`, with each program's alpha.
- A load says "N of N tensors applied to M layers" through `Applied`, or raises; nothing is applied in part.
- How strongly an adapter acts is its weight, whether it is active and the call's own scale, multiplied onto each
  layer's alpha / rank. The table of adapters sits on the trunk: pipelines that share a trunk share its adapters.
- Fusing lets an adapter act in the 16-bit weights; the trunk's stack (`mm.adapters.stack`) keeps what was there, so
  that unfusing is exact, in any order. A 4-bit weight takes no fusing.
- diffusers' own `LoraBaseMixin` is not inherited: it costs every cold start a third of a second, for text encoders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mm.adapters.patch import Applied, Patch
    from mm.adapters.stack import Stack
    from mm.models.trunk import Trunk

_FILE = "pytorch_lora_weights.safetensors"


@dataclass(kw_only=True, eq=False)
class Adapter:
    """A loaded LoRA. `fused`: it acts in the weights, and neither its weight nor a call's scale changes that."""

    patch: Patch
    weight: float = 1.0
    active: bool = True
    fused: bool = False


@dataclass(kw_only=True)
class Adapters:
    """A trunk's adapters in the order of loading, and whether they are switched on at all."""

    by_name: dict[str, Adapter] = field(default_factory=dict)
    enabled: bool = True


class TrunkLoraMixin:
    """diffusers' adapter calls for a pipeline whose trunk takes LoRA."""

    trunk: Trunk

    def load_lora_weights(
        self,
        source: str | Path | Mapping[str, Tensor],
        adapter_name: str = "default",
        *,
        weight_name: str = _FILE,
        truncate_to: int | None = None,
    ) -> Applied:
        """Loads a LoRA and makes it the active one; says what was applied.

        `source` is a file, a folder holding `weight_name`, or tensors by name. `truncate_to` is a rank for LoKr, LoHa
        and DoRA, which 4-bit layers need; without it they are exact. Raises UserError when any tensor does not match.
        """
        from mm.adapters.formats import read_lora

        if not adapter_name or "." in adapter_name:
            raise UserError(f"adapter_name is {adapter_name!r}; give a name without dots")
        if adapter_name in self._adapters.by_name:
            raise UserError(f"an adapter {adapter_name!r} is loaded already; unload it or choose another adapter_name")
        patch = read_lora(_file(source, weight_name), self, name=adapter_name, truncate_to=truncate_to)
        applied = patch.apply(self)
        for adapter in self._adapters.by_name.values():
            adapter.active = False
        self._adapters.by_name[adapter_name] = Adapter(patch=patch)
        self._adapters.enabled = True
        self._rescale()
        return applied

    def save_lora_weights(self, folder: str | Path, adapter_name: str = "default", *, weight_name: str = _FILE) -> Path:
        """Writes an adapter in diffusers' layout to `weight_name` in `folder`."""
        from mm.adapters.formats import write_lora

        [adapter] = self._known([adapter_name])
        path = Path(folder) / weight_name
        write_lora(adapter.patch, path)
        return path

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Activates adapters, each with its weight (1 by default); the others do nothing until they are named again."""
        chosen = self._known(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(chosen)
        if len(weights) != len(chosen):
            raise UserError(f"{len(weights)} adapter_weights for {len(chosen)} adapters; give one for each")
        for adapter in self._adapters.by_name.values():
            adapter.active = False
        for adapter, weight in zip(chosen, weights, strict=True):
            adapter.active, adapter.weight = True, 1.0 if weight is None else float(weight)
        self._rescale()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters off for good; the others stay."""
        for adapter in self._known(adapter_names):
            adapter.patch.undo(self)
            del self._adapters.by_name[adapter.patch.name]

    def disable_lora(self) -> None:
        """Switches all adapters off without taking them off."""
        self._switch(False)

    def enable_lora(self) -> None:
        """Switches the active adapters on again."""
        self._switch(True)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of the loaded adapters by component, active or not."""
        return {"trunk": list(self._adapters.by_name)} if self._adapters.by_name else {}

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [name for name, adapter in self._adapters.by_name.items() if adapter.active]

    def unload_lora_weights(self) -> None:
        """Takes all adapters off; the trunk is as it was."""
        if self._adapters.by_name:
            self.delete_adapters(list(self._adapters.by_name))

    def fuse_lora(self, *, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Lets adapters act in the 16-bit weights: those named, or the active ones.

        Raises:
            UserError: where a weight is quantized or an adapter is fused already; nothing is changed then.
        """
        chosen = self._known(adapter_names or self.get_active_adapters())
        twice = [a.patch.name for a in chosen if a.fused]
        if twice:
            raise UserError(f"adapter {twice[0]!r} is fused already; unfuse it first")
        stack = self._stack
        try:
            for adapter in chosen:
                stack.scale(adapter.patch.name, lora_scale * adapter.weight)
            stack.fuse(*(adapter.patch.name for adapter in chosen))
        except BaseException:
            self._rescale()
            raise
        for adapter in chosen:
            adapter.fused = True
        self._rescale()

    def unfuse_lora(self) -> None:
        """Takes fused adapters out of the weights again, exactly."""
        fused = [adapter for adapter in self._adapters.by_name.values() if adapter.fused]
        self._stack.unfuse(*(adapter.patch.name for adapter in fused))
        for adapter in fused:
            adapter.fused = False
        self._rescale()

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
        self._known([])
        self._rescale(scale)
        try:
            yield
        finally:
            self._rescale()

    @property
    def _stack(self) -> Stack:
        from mm.adapters.stack import stack_of  # kernels are loaded where adapters are

        return stack_of(self)

    @property
    def _adapters(self) -> Adapters:
        from mm.layers.surgery import unwrapped

        attributes = unwrapped(self.trunk).__dict__
        return attributes.setdefault("mm_adapters", Adapters())

    def _rescale(self, call: float = 1.0) -> None:
        """Gives every branch its strength; what is fused acts through the weights."""
        stack = self._stack
        for name, adapter in self._adapters.by_name.items():
            if not adapter.fused:
                stack.scale(name, call * adapter.weight if self._adapters.enabled and adapter.active else 0.0)

    def _switch(self, on: bool) -> None:
        self._known([])
        self._adapters.enabled = on
        self._rescale()

    def _known(self, names: str | Sequence[str]) -> list[Adapter]:
        """The named adapters. Raises UserError when one of them, or any adapter at all, is not loaded."""
        chosen, loaded = [names] if isinstance(names, str) else list(names), self._adapters.by_name
        missing = [name for name in chosen if name not in loaded]
        if missing or not loaded:
            what = f"no adapter {missing[0]!r}" if missing else "no adapter"
            raise UserError(f"{what} is loaded; loaded: {', '.join(loaded) or 'none'}")
        return [loaded[name] for name in chosen]


def _file(source: str | Path | Mapping[str, Tensor], weight_name: str) -> Path | Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    path = path / weight_name if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no LoRA at {path}; give a .safetensors file or a folder holding {weight_name}")
    return path
