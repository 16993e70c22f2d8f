"""The weight a layer had before patches changed it, kept in the layer itself.

Design choices
- A kept weight is a buffer that `state_dict` leaves out: it follows the layer through `.to()`, `deepcopy` and hooks, so
  that taking patches off gives what the model would be without them. Of an embedding only the changed rows are kept.
- `state_dict` gives the weights as they are, patches included: offloading and other libraries read it as the values to
  run with. What saves or identifies the model without patches asks `original_weight`.
- Loading another weight under a kept one raises: undoing would put the earlier weight back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.layers.offloading import stored

KEPT = "_mm_original"
KEPT_BIAS = "_mm_original_bias"
_IDS = "_mm_original_ids"


def kept(module: nn.Module) -> Tensor | None:
    """The weight kept in a layer, or the kept rows of an embedding; None where patches changed nothing."""
    return module._buffers.get(KEPT)


def kept_ids(module: nn.Module) -> Tensor:
    """Which rows of an embedding are kept (n,)."""
    ids = module._buffers.get(_IDS)
    return torch.empty(0, dtype=torch.long) if ids is None else ids


def keep(module: nn.Module, original: Tensor, ids: Tensor | None = None) -> None:
    """Keeps a weight, or some rows of it."""
    if kept(module) is None:
        module.register_load_state_dict_pre_hook(_refuse_loading)
    for name, tensor in ((KEPT, original), (_IDS, ids)):
        module._buffers.pop(name, None)
        if tensor is not None:
            module.register_buffer(name, tensor, persistent=False)


def forget(module: nn.Module) -> None:
    """Keeps nothing from now on; the weight as it is becomes the layer's own."""
    for name in (KEPT, _IDS):
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    _drop_hook(module, _refuse_loading)


def _drop_hook(module: nn.Module, function: Any) -> None:
    hooks = module._load_state_dict_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) is function]:
        del hooks[key]


def kept_bias(module: nn.Module) -> Tensor | None:
    """The bias kept in a layer; None where patches did not change it."""
    return module._buffers.get(KEPT_BIAS)


def keep_bias(module: nn.Module, original: Tensor) -> None:
    """Keeps a bias."""
    if kept_bias(module) is None:
        module.register_load_state_dict_pre_hook(_refuse_bias)
    module._buffers.pop(KEPT_BIAS, None)
    module.register_buffer(KEPT_BIAS, original, persistent=False)


def forget_bias(module: nn.Module) -> None:
    """Keeps no bias from now on; the bias as it is becomes the layer's own."""
    module._buffers.pop(KEPT_BIAS, None)
    module._non_persistent_buffers_set.discard(KEPT_BIAS)
    _drop_hook(module, _refuse_bias)


def original_weight(module: nn.Module) -> Tensor | None:
    """The whole weight of a layer as it was before patches; None where patches changed nothing."""
    original = kept(module)
    if original is None or module._buffers.get(_IDS) is None:
        return original
    weight = stored(module, "weight")
    assert weight is not None
    whole = weight.detach().clone()
    whole[kept_ids(module).to(whole.device)] = original.to(whole)
    return whole


def refuse_patched(root: nn.Module, name: str) -> None:
    """Raises UserError where patches have changed weights of a model that is about to be quantized."""
    for path, module in root.named_modules():
        if kept(module) is not None or kept_bias(module) is not None:
            raise UserError(
                f"patches have changed the weight or bias of {name}.{path}; undo or bake them, then quantize"
            )


def _refuse_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    _refuse("weight", module, state_dict, prefix)


def _refuse_bias(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    _refuse("bias", module, state_dict, prefix)


def _refuse(name: str, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    if f"{prefix}{name}" in state_dict:
        raise UserError(
            f"{prefix.rstrip('.') or type(module).__name__} has a {name} that patches changed; undo or bake them "
            f"before another {name} is loaded"
        )
