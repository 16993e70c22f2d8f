"""What `save_pretrained` writes of a model with patches on it: the model without them, and a warning that names them.

Nothing of mm's layers is imported before such a model is there: libraries are wrapped at every start.
A patch has a file of its own, and a saved 4-bit folder must match its config. `bake` puts a patch into what is saved.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_in_progress: ContextVar[bool] = ContextVar("mm_saving", default=False)


def adapters_on(root: nn.Module) -> tuple[str, ...]:
    """Names of patches and of branches attached by hand, in the order of the layers."""
    if "mm.layers.linear" not in sys.modules:  # no layer of a running program has branches or patches then
        return ()
    from mm.adapters.layer_state import placed_on
    from mm.layers.linear import BranchedLinear

    names: dict[str, None] = {}
    for module in root.modules():
        names |= dict.fromkeys(placed.name for placed in placed_on(module))
        if isinstance(module, BranchedLinear):
            names |= dict.fromkeys(branch.name for branch in module.branches)
    return tuple(names)


def wrap_saving(module: str, kind: str) -> None:
    """Wraps `save_pretrained` of a library's base class."""
    owner = getattr(sys.modules[module], kind)
    before = owner.save_pretrained

    @functools.wraps(before)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = () if _in_progress.get() else adapters_on(self)
        wrapped = [] if _in_progress.get() else _wrapped_by_peft(self)
        if not names and not wrapped:
            return before(self, *args, **kwargs)
        tuners: Any = [self.get_submodule(path) for path in wrapped]
        names += tuple(sorted({str(name) for tuner in tuners for name in tuner.active_adapters}))
        warnings.warn(
            f"{type(self).__name__} is saved without what is applied to it: {', '.join(map(repr, names))}. Save "
            "patches with patch.save and LoRAs with save_lora_weights, or bake or fuse them into 16-bit weights first",
            stacklevel=2,
        )
        from mm.adapters.layer_state import lifted

        token = _in_progress.set(True)
        try:
            with lifted(self), _named_plainly(self, wrapped):
                return before(self, *args, **kwargs)
        finally:
            _in_progress.reset(token)

    owner.save_pretrained = save_pretrained


def _wrapped_by_peft(model: Any) -> list[str]:
    """The layers of a quantized diffusers model that peft has wrapped: under its names no folder could be loaded again.

    transformers saves peft's adapters in files of their own, and what diffusers does with 16-bit models is its own.
    """
    if "mm.layers.linear" not in sys.modules or not hasattr(model, "register_to_config"):
        return []
    from mm.layers.linear import BranchedLinear
    from mm.layers.surgery import tuner_paths

    quantized = any(isinstance(module, BranchedLinear) and module.bits != 16 for module in model.modules())
    return tuner_paths(model) if quantized else []


@contextmanager
def _named_plainly(model: Any, wrapped: Collection[str]) -> Iterator[None]:
    """Within the context the model's `state_dict` has the names of the plain model, and no adapters."""
    if not wrapped:
        yield
        return
    from mm.layers.surgery import plain_names

    plain = plain_names(model.state_dict(), wrapped)
    model.__dict__["state_dict"] = lambda *_, **__: plain
    try:
        yield
    finally:
        del model.__dict__["state_dict"]
