"""The adapters of a trunk: those that mm loaded, which are patches, and those that peft added to the model itself.

Design choices
- The table sits on the trunk: pipelines that share a trunk share its adapters.
- `trunk.add_adapter(LoraConfig(...))` and diffusers' training scripts put peft's layers into the trunk. They are
  listed, weighted, switched and removed by the same calls of the pipeline; `PeftAdapters` passes these on to diffusers.
- A call's own scale changes branches that all calls share. Calls at one scale run side by side; one at another scale
  waits until they are done (`CallScale`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from mm.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from mm.adapters.patch import Patch


@dataclass(kw_only=True, eq=False)
class Adapter:
    """A loaded LoRA.

    Attributes:
        patch: Its entries.
        weight: How strongly it acts where it is active.
        active: Whether it acts.
        fused: Whether it acts in the weights; neither its weight nor a call's scale changes that.
        parked: The device that its tensors were moved to, off the trunk; None where it is on the trunk.
    """

    patch: Patch
    weight: float = 1.0
    active: bool = True
    fused: bool = False
    parked: Any = None


@dataclass(kw_only=True)
class Adapters:
    """A trunk's adapters in the order of loading, and whether they are switched on at all."""

    by_name: dict[str, Adapter] = field(default_factory=dict)
    enabled: bool = True
    peft_off: bool = False  # none of peft's adapters was named when adapters were last activated


class PeftAdapters:
    """Adapters that peft added to a model of diffusers.

    Args:
        model: The model.
        table: Its table of adapters.
    """

    def __init__(self, model: Any, table: Adapters) -> None:
        self.model, self.table = model, table

    def names(self) -> list[str]:
        """All of them, in order."""
        return list(getattr(self.model, "peft_config", None) or {}) if self._there else []

    def active(self) -> list[str]:
        """Those that act."""
        return list(self.model.active_adapters()) if self.names() and not self.table.peft_off else []

    def activate(self, weights: dict[str, float]) -> None:
        """Makes these act with their weights, and no others."""
        self.table.peft_off = bool(self.names()) and not weights
        if not self.names():
            return
        if not weights:
            self.model.disable_lora()
            return
        self.model.enable_lora()
        self.model.set_adapters(list(weights), list(weights.values()))

    def switch(self, on: bool) -> None:
        """Switches all of them on or off."""
        if self.names():
            self.model.enable_lora() if on and not self.table.peft_off else self.model.disable_lora()

    def delete(self, names: Sequence[str]) -> None:
        """Takes adapters off; where none is left, peft's layers go too."""
        if not names:
            return
        if set(names) >= set(self.names()):
            self.model.unload_lora()
            self.table.peft_off = False
        else:
            self.model.delete_adapters(list(names))

    @property
    def _there(self) -> bool:
        return bool(getattr(self.model, "_hf_peft_config_loaded", False))


class CallScale:
    """The LoRA scale of the calls in progress on one trunk."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders: list[tuple[int, float]] = []

    @property
    def now(self) -> float:
        """The scale of the calls in progress; 1 where there are none."""
        holders = self._holders
        return holders[0][1] if holders else 1.0

    @contextmanager
    def hold(self, scale: float, apply: Any) -> Iterator[None]:
        """Runs a call at this scale. `apply(scale)` sets the branches, at the start of the first call and at its end.

        Raises:
            UserError: where this very thread has a call in progress at another scale, which it would wait for for ever.
        """
        me = threading.get_ident()
        with self._changed:
            while any(held != scale for _, held in self._holders):
                if any(thread == me for thread, _ in self._holders):
                    raise UserError(f"a call at LoRA scale {scale:g} began within one of another scale; end that first")
                self._changed.wait()
            if not self._holders and scale != 1.0:
                apply(scale)
            self._holders.append((me, scale))
        try:
            yield
        finally:
            with self._changed:
                self._holders.remove((me, scale))
                if not self._holders:
                    if scale != 1.0:
                        apply(1.0)
                    self._changed.notify_all()


_SCALES: WeakKeyDictionary[nn.Module, CallScale] = WeakKeyDictionary()
_SCALES_LOCK = threading.Lock()


def call_scale(model: nn.Module) -> CallScale:
    """The one of a model; kept beside it, since locks can be neither copied nor saved."""
    with _SCALES_LOCK:
        return _SCALES.setdefault(model, CallScale())
