"""Layers whose tensors are kept elsewhere between calls: accelerate's hooks and diffusers' group offloading.

Design choices
- accelerate's sequential offload leaves meta tensors in the module and keeps the values in the hook's map. A change of
  such a layer goes to the map, and what is attached to it is made on the device where the layer runs.
- Both libraries replace a module's `forward` and keep the earlier, bound one. Where a layer changes its class in place,
  those kept functions are bound again to the new class.
- diffusers' group offloading with streams keeps lists of tensors; it is applied again after a change, as diffusers does
  after loading a LoRA. Groups that are offloaded to disk keep files, which take no change.

Facts about hooks: accelerate 1.15 (`accelerate.hooks`), diffusers 0.42 (`diffusers.hooks`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.nouns import with_article


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks of a module, one by one."""
    hook = module.__dict__.get("_hf_hook")
    yield from getattr(hook, "hooks", () if hook is None else (hook,))


def _held(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters.get(name)
    return module._buffers.get(name) if parameter is None else parameter


def stored(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module, from the hook's map where the module itself holds a meta tensor.

    Args:
        module: the layer.
        name: of one of its own parameters or buffers.

    Returns:
        The tensor, which may be changed in place; None where the layer has none of that name.

    Raises:
        UserError: where the values cannot be found.
    """
    tensor = _held(module, name)
    if tensor is None or tensor.device.type != "meta":
        return tensor
    for hook in _hooks(module):
        if getattr(hook, "weights_map", None) is not None and name in hook.weights_map:
            return hook.weights_map[name]
    raise UserError(
        f"the {name} of {with_article(type(module).__name__)} is on the meta device, and no offload hook of the "
        "layer has its values; put adapters on before offloading"
    )


def run_device(module: nn.Module, name: str) -> torch.device:
    """Where the module's tensor `name` is when the module runs."""
    tensor = _held(module, name)
    assert tensor is not None, name
    if tensor.device.type == "meta":
        for hook in _hooks(module):
            if getattr(hook, "offload", False) and hook.execution_device is not None:
                return torch.empty(0, device=hook.execution_device).device
    return tensor.device


def cannot_change(module: nn.Module, name: str) -> str:
    """Why a tensor of the module cannot be changed in place; empty where it can."""
    first = stored(module, name)
    second = stored(module, name)
    if first is None or second is None:
        return f"it has no {name}"
    if first.data_ptr() != second.data_ptr():
        return f"its {name} is offloaded to disk; change it before offloading"
    return ""


def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Copies a value into a tensor of the module, wherever it is kept; the tensor stays the same object."""
    tensor = stored(module, name)
    assert tensor is not None, name
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # in this order: the first sets grad mode
        tensor.copy_(value)


# ---- replaced forwards -----------------------------------------------------------------------------------------------


def rebind(module: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Hooks of `module` that call its class's `old` forward call `new` from now on."""

    def fresh(function: Any) -> Any:
        bound = isinstance(function, MethodType) and function.__self__ is module and function.__func__ is old
        return MethodType(new, module) if bound else function

    for name in ("forward", "_old_forward"):
        if name in module.__dict__:
            module.__dict__[name] = fresh(module.__dict__[name])
    for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        reference.forward = fresh(reference.forward)
        reference.original_forward = fresh(reference.original_forward)


def foreign_forward(module: nn.Module) -> bool:
    """Whether something that mm does not know has replaced the forward of this one module."""
    forward = module.__dict__.get("forward")
    own = isinstance(forward, MethodType) and forward.__self__ is module
    known = "_old_forward" in module.__dict__ or "_diffusers_hook" in module.__dict__
    return forward is not None and not own and not known


# ---- diffusers' group offloading -------------------------------------------------------------------------------------


def _groups(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        hook = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).get("group_offloading")
        if hook is not None:
            yield hook.group


def check_groups(root: nn.Module) -> None:
    """Raises UserError where a model is offloaded to files, which keep what it was when they were written."""
    for group in _groups(root):
        if group.offload_to_disk_path:
            raise UserError(
                f"{type(root).__name__} is group-offloaded to {group.offload_to_disk_path}; put adapters on or take "
                "them off before that, or offload to memory"
            )


def refresh_groups(root: nn.Module) -> None:
    """Lets group offloading with streams, which keeps lists of tensors, see the tensors that are there now."""
    library = sys.modules.get("diffusers.hooks.group_offloading")
    if library is not None and any(group.stream is not None for group in _groups(root)):
        library._maybe_remove_and_reapply_group_offloading(root)
