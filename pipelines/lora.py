"""LoRA on the trunk: load, scale, take off. What does not match raises; nothing loads silently without effect.

Design choices
- An adapter is a patch (`mm.adapters.patch`) whose low-rank entries become live branches of the trunk's linears:
  nothing is injected or wrapped, 16-bit and 4-bit layers take them, and removing them restores the trunk bit for
  bit. Files of peft, diffusers and kohya are read by `mm.adapters.formats`, with each program's alpha.
- A load says "N of N tensors applied to M layers" through `Applied`, or raises; nothing is applied in part.
- How strongly an adapter acts is its weight, whether it is active and the call's own scale, multiplied onto each
  layer's alpha / rank.
- Fusing lets an adapter act in the 16-bit weights; the trunk's stack (`mm.adapters.stack`) keeps what was there, so
  that unfusing is exact, in any order. A 4-bit weight takes no fusing.
- Calls, names and arguments are those of diffusers' `LoraBaseMixin`. It is not inherited: it costs every cold start a
  third of a second, for text encoders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.pipelines.lora_files import FILE, lora_tensors, save_lora_weights
from mm.pipelines.lora_table import Adapter, Adapters, PeftAdapters, call_scale

if TYPE_CHECKING:
    from torch import Tensor, device

    from mm.adapters.patch import Applied
    from mm.adapters.stack import Stack
    from mm.models.trunk import Trunk

_COMPONENTS = ("trunk",)


class TrunkLoraMixin:
    """diffusers' adapter calls for a pipeline whose trunk takes LoRA."""

    trunk: Trunk
    lora_state_dict = staticmethod(lora_tensors)
    save_lora_weights = save_lora_weights

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        hotswap: bool = False,
        weight_name: str = FILE,
        truncate_to: int | None = None,
        low_cpu_mem_usage: bool = True,
        **options: Any,
    ) -> Applied:
        """Loads a LoRA and makes it the active one; says what was applied.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder or a hub name holding `weight_name`, or tensors by
                name.
            adapter_name: The name; by default "default_0", then "default_1", ...
            hotswap: Replaces the adapter of this name, keeping its weight and whether it is active.
            weight_name: The file of a folder.
            truncate_to: A rank for LoKr, LoHa and DoRA, which 4-bit layers need; without it they are exact.
            low_cpu_mem_usage: Taken for diffusers' sake; tensors are never held twice.
            **options: `prefix`, `subfolder`, `use_safetensors`, and options of a hub download, as in diffusers.

        Raises:
            UserError: Where any tensor does not match; the trunk is as before then.
        """
        from mm.adapters.formats import read_lora

        name = self._free_name() if adapter_name is None else adapter_name
        if not name or "." in name:
            raise UserError(f"adapter_name is {name!r}; give a name without dots")
        if name in self._peft.names():
            raise UserError(f"an adapter {name!r} was added to the trunk by peft; delete it or choose another name")
        old = self._adapters.by_name.get(name)
        if hotswap and old is None:
            raise UserError(f"hotswap=True replaces an adapter, and {name!r} is not loaded")
        if old is not None and not hotswap:
            raise UserError(f"an adapter {name!r} is loaded already; unload it or choose another adapter_name")
        found = lora_tensors(pretrained_model_name_or_path_or_dict, weight_name=weight_name, as_source=True, **options)
        patch = read_lora(found, self, name=name, truncate_to=truncate_to)
        if old is not None:
            return self._swap(old, patch)
        applied = patch.apply(self)
        for adapter in self._adapters.by_name.values():
            adapter.active = False
        self._adapters.by_name[name] = Adapter(patch=patch)
        self._adapters.enabled = True
        self._peft.activate({})
        self._rescale()
        return applied

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Activates adapters, each with its weight (1 by default); the others do nothing until they are named again."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise UserError(
                f"{counted(len(weights), 'adapter_weight', 'adapter_weights')} for "
                f"{counted(len(names), 'adapter')}; give one for each"
            )
        by_peft = set(self._peft.names())
        given = {name: 1.0 if w is None else float(w) for name, w in zip(names, weights, strict=True)}
        chosen = self._known([name for name in names if name not in by_peft])
        parked = [a for a in chosen if a.parked is not None]
        if parked:
            raise UserError(
                f"adapter {parked[0].patch.name!r} is on {parked[0].parked}; put it back with set_lora_device first"
            )
        for adapter in self._adapters.by_name.values():
            adapter.active = False
        for adapter in chosen:
            adapter.active, adapter.weight = True, given[adapter.patch.name]
        self._peft.activate({name: w for name, w in given.items() if name in by_peft})
        self._rescale()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Takes adapters off for good; the others stay."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        by_peft = [name for name in names if name in self._peft.names()]
        chosen = self._known([name for name in names if name not in by_peft])
        self._peft.delete(by_peft)
        for adapter in chosen:
            if adapter.parked is None:
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
        names = [*self._adapters.by_name, *self._peft.names()]
        return {"trunk": names} if names else {}

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        own = [name for name, adapter in self._adapters.by_name.items() if adapter.active]
        return [*own, *self._peft.active()]

    def unload_lora_weights(self, reset_to_overwritten_params: bool = False) -> None:
        """Takes all adapters off; the trunk is as it was. The argument is for layers that diffusers resizes."""
        if names := self.get_list_adapters().get("trunk"):
            self.delete_adapters(names)

    def fuse_lora(
        self,
        components: Sequence[str] = _COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Lets adapters act in the 16-bit weights: those named, or the active ones.

        Args:
            components: `["trunk"]`; there is no other.
            lora_scale: Multiplied onto the adapters' weights.
            safe_fusing: Taken for diffusers' sake; a LoRA with NaN is refused when it is loaded.
            adapter_names: Which adapters; by default the active ones.

        Raises:
            UserError: where a weight is quantized or an adapter is fused already; nothing is changed then.
        """
        _only_trunk(components)
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

    def unfuse_lora(self, components: Sequence[str] = _COMPONENTS) -> None:
        """Takes fused adapters out of the weights again, exactly."""
        _only_trunk(components)
        fused = [adapter for adapter in self._adapters.by_name.values() if adapter.fused]
        self._stack.unfuse(*(adapter.patch.name for adapter in fused))
        for adapter in fused:
            adapter.fused = False
        self._rescale()

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters that act in the weights."""
        return {name for name, adapter in self._adapters.by_name.items() if adapter.fused}

    @property
    def num_fused_loras(self) -> int:
        """How many adapters act in the weights."""
        return len(self.fused_loras)

    @property
    def lora_scale(self) -> float:
        """The scale that the calls in progress give, in `attention_kwargs`; 1 where there are none."""
        from mm.layers.surgery import unwrapped

        return call_scale(unwrapped(self.trunk)).now

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Does nothing: `load_lora_weights(..., hotswap=True)` needs no preparation, since a branch has any rank."""
        if target_rank < 1:
            raise UserError(f"target_rank is {target_rank}; give 1 or more")

    def set_lora_device(self, adapter_names: str | Sequence[str], device: device | str | int) -> None:
        """Moves adapters off the trunk to a device, or back onto the trunk where that is the trunk's device.

        An adapter that is elsewhere takes no memory of the trunk's device and does not act.
        """
        import torch

        where = torch.device(device)
        home = next(self.trunk.parameters()).device
        for adapter in self._known(adapter_names):
            if where.type == home.type and where.index in (None, home.index):
                if adapter.parked is not None:
                    adapter.parked = None
                    adapter.patch.apply(self)
            elif adapter.fused:
                raise UserError(f"adapter {adapter.patch.name!r} is fused; unfuse it first")
            else:
                if adapter.parked is None:
                    adapter.patch.undo(self)
                adapter.parked, adapter.active = where, False
                for entry in adapter.patch.entries.values():
                    for key, tensor in entry.tensors.items():
                        entry.tensors[key] = tensor.to(where)
        self._rescale()

    @contextmanager
    def scaled_lora(self, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """Scales active adapters by `attention_kwargs["scale"]` for one call; others at another scale wait."""
        given = dict(attention_kwargs or {})
        scale = float(given.pop("scale", 1.0))
        if given:
            raise UserError(f"unknown attention_kwargs {sorted(given)}; known: scale")
        if scale != 1.0:
            self._known([])
        from mm.layers.surgery import unwrapped

        with call_scale(unwrapped(self.trunk)).hold(scale, self._rescale):
            yield

    @property
    def _stack(self) -> Stack:
        from mm.adapters.stack import stack_of  # kernels are loaded where adapters are

        return stack_of(self)

    @property
    def _adapters(self) -> Adapters:
        from mm.layers.surgery import unwrapped

        attributes = unwrapped(self.trunk).__dict__
        return attributes.setdefault("mm_adapters", Adapters())

    @property
    def _peft(self) -> PeftAdapters:
        from mm.layers.surgery import unwrapped

        return PeftAdapters(unwrapped(self.trunk), self._adapters)

    def _rescale(self, call: float = 1.0) -> None:
        """Gives every branch its strength; what is fused acts through the weights."""
        stack = self._stack
        for name, adapter in self._adapters.by_name.items():
            if not adapter.fused and adapter.parked is None:
                stack.scale(name, call * adapter.weight if self._adapters.enabled and adapter.active else 0.0)

    def _swap(self, old: Adapter, patch: Any) -> Applied:
        """The new patch in the place of an old one; where it does not fit, the old one is put back."""
        if old.fused:
            raise UserError(f"adapter {patch.name!r} is fused; unfuse it before hotswap")
        if old.parked is None:
            old.patch.undo(self)
        try:
            applied: Applied = patch.apply(self)
        except BaseException:
            if old.parked is None:
                old.patch.apply(self)
            self._rescale()
            raise
        old.patch, old.parked = patch, None
        self._rescale()
        return applied

    def _switch(self, on: bool) -> None:
        if not self._peft.names():
            self._known([])
        self._adapters.enabled = on
        self._peft.switch(on)
        self._rescale()

    def _free_name(self) -> str:
        taken = {*self._adapters.by_name, *self._peft.names()}
        return next(name for k in range(len(taken) + 1) if (name := f"default_{k}") not in taken)

    def _known(self, names: str | Sequence[str]) -> list[Adapter]:
        """The named adapters. Raises UserError when one of them, or any adapter at all, is not loaded."""
        chosen, loaded = [names] if isinstance(names, str) else list(names), self._adapters.by_name
        missing = [name for name in chosen if name not in loaded]
        if missing or not (loaded or self._peft.names()):
            what = f"no adapter {missing[0]!r}" if missing else "no adapter"
            raise UserError(f"{what} is loaded; loaded: {', '.join(loaded) or 'none'}")
        return [loaded[name] for name in chosen]


def _only_trunk(components: Sequence[str]) -> None:
    unknown = [name for name in components if name not in _COMPONENTS]
    if unknown or isinstance(components, str):
        raise UserError(f"components is {components!r}; adapters of this pipeline act on {list(_COMPONENTS)} only")
