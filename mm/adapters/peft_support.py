"""peft's and diffusers' LoRA calls on layers whose weight is quantized, or changed by patches.

Design choices
- peft merges by writing to `base_layer.weight.data`. A quantized layer has no such weight: there a merged LoRA is a
  branch of the layer, the same sum, and unmerging takes the branch off. What is no plain LoRA raises.
- A weight that patches changed takes no merging: undoing the patch would drop what was merged.
- Whether everything can be merged is checked before anything is.
- Nothing of mm's layers is imported before a model has some: the libraries are wrapped at every start.
- diffusers looks up `<layer>.weight` in the transformer's `state_dict` when a FLUX LoRA is loaded, for its shape; a
  quantized layer gets one there.

Facts: peft 0.21 (`tuners.lora.layer`), diffusers 0.42 (`loaders`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mm.core.errors import UserError
from mm.core.nouns import with_article
from mm.layers.originals import kept, kept_bias

if TYPE_CHECKING:
    from mm.layers.linear import BranchedLinear


def _quantized(layer: object) -> bool:
    linear = sys.modules.get("mm.layers.linear")  # imported by whatever has made such a layer
    return linear is not None and isinstance(layer, linear.BranchedLinear) and layer.bits != 16


def why_not(tuner: Any, adapter_names: Sequence[str] | None) -> str:
    """Why a peft layer's adapters cannot be merged; empty where they can."""
    layer = tuner.get_base_layer()
    if why := _patched(layer):
        return why
    if not _quantized(layer):
        return ""
    if not hasattr(tuner, "lora_A"):
        return f"{with_article(type(tuner).__name__)} adapter cannot be merged into quantized weights; only LoRA can"
    for name in adapter_names or tuner.active_adapters:
        if name in tuner.lora_A and (name in tuner.lora_variant or tuner.lora_bias.get(name)):
            what = "a bias" if tuner.lora_bias.get(name) else "DoRA or another variant"
            return f"adapter {name!r} has {what}, which cannot be merged into quantized weights; a plain LoRA can"
    return ""


def _patched(layer: nn.Module) -> str:
    if kept(layer) is None and kept_bias(layer) is None:
        return ""
    from mm.adapters.layer_state import placed_on

    names = ", ".join(repr(p.name) for p in placed_on(layer) if not p.is_branch)
    return f"patches ({names}) have changed the weight or bias below it; undo or bake them first"


def check(models: Iterable[nn.Module], adapter_names: Sequence[str] | None = None) -> None:
    """Raises UserError, before anything is merged, where a layer of the models takes no merging."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for model in models:
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer) and (why := why_not(module, adapter_names)):
                raise UserError(f"{path}: {why}")


def _merge(tuner: Any, adapter_names: list[str] | None) -> None:
    from peft.tuners.tuners_utils import check_adapters_to_merge

    from mm.layers.linear import Branch

    layer: BranchedLinear = tuner.get_base_layer()
    names = [n for n in check_adapters_to_merge(tuner, adapter_names) if n in tuner.lora_A]
    taken = {b.name for b in layer.branches}
    made = []
    for name in names:
        free = next(n for n in (f"merged {name}", *(f"merged {name} {k}" for k in range(2, 999))) if n not in taken)
        taken.add(free)
        halves = {"down": tuner.lora_A[name].weight, "up": tuner.lora_B[name].weight}
        copies = {k: t.detach().clone() for k, t in halves.items()}
        made.append(Branch(name=free, scale=float(tuner.scaling[name]), origin="merged", **copies))
    layer.arrange([*layer.branches, *made])
    merged = tuner.__dict__.setdefault("_mm_merged", {})
    for name, branch in zip(names, made, strict=True):
        merged[name] = branch.name
        tuner.merged_adapters.append(name)


def wrap_merging() -> None:
    """peft's LoRA of linear layers merges into quantized ones as a branch."""
    kind = sys.modules["peft.tuners.lora.layer"].Linear
    merge_before, unmerge_before = kind.merge, kind.unmerge

    @functools.wraps(merge_before)
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if why := why_not(self, adapter_names):
            raise UserError(why)
        if _quantized(self.get_base_layer()):
            _merge(self, adapter_names)
        else:
            merge_before(self, safe_merge=safe_merge, adapter_names=adapter_names)

    @functools.wraps(unmerge_before)
    def unmerge(self: Any) -> None:
        layer = self.get_base_layer()
        if self.merged and (why := _patched(layer)):
            raise UserError(why)
        merged = self.__dict__.get("_mm_merged", {})
        if not (_quantized(layer) and merged):
            unmerge_before(self)
            return
        while self.merged_adapters:
            layer.detach(merged.pop(self.merged_adapters.pop()))

    kind.merge, kind.unmerge = merge, unmerge


def wrap_merge_check() -> None:
    """peft's check before merging asks all layers of the model first."""
    kind = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    before = kind._check_merge_allowed

    @functools.wraps(before)
    def check_merge_allowed(self: Any) -> None:
        before(self)
        check([self.model])

    kind._check_merge_allowed = check_merge_allowed


def wrap_fusing_of_models() -> None:
    """diffusers' `fuse_lora` of a model asks all its layers first."""
    kind = sys.modules["diffusers.loaders.peft"].PeftAdapterMixin
    before = kind.fuse_lora

    @functools.wraps(before)
    def fuse_lora(self: Any, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Any = None) -> None:
        check([self], adapter_names)
        before(self, lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

    kind.fuse_lora = fuse_lora


def wrap_fusing_of_pipelines() -> None:
    """diffusers' `fuse_lora` of a pipeline asks all layers of all components first."""
    kind = sys.modules["diffusers.loaders.lora_base"].LoraBaseMixin
    before = kind.fuse_lora

    @functools.wraps(before)
    def fuse_lora(self: Any, components: list[str] | None = None, *args: Any, **kwargs: Any) -> None:
        parts = [getattr(self, name, None) for name in components or []]
        check([part for part in parts if isinstance(part, nn.Module)], kwargs.get("adapter_names"))
        before(self, components, *args, **kwargs)

    kind.fuse_lora = fuse_lora


class _WithWeights:
    """A transformer whose `state_dict` also has the shapes of weights that quantized layers compute."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Any]:
        state = dict(self._model.state_dict())
        module: Any
        for path, module in self._model.named_modules():
            if _quantized(module):
                one = torch.empty(1, 1, device=module.qweight.device)
                state[f"{path}.weight"] = one.expand(module.out_features, module.in_features)
        return state


def wrap_expanding() -> None:
    """diffusers' reading of FLUX LoRAs finds the shapes of quantized layers."""
    kind = sys.modules["diffusers.loaders.lora_pipeline"].FluxLoraLoaderMixin
    before = kind.__dict__["_maybe_expand_lora_state_dict"].__func__

    @functools.wraps(before)
    def expand(cls: Any, transformer: Any, lora_state_dict: dict[str, Any]) -> Any:
        return before(cls, _WithWeights(transformer), lora_state_dict)

    kind._maybe_expand_lora_state_dict = classmethod(expand)
