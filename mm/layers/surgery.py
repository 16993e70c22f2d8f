"""Finds and replaces layers of a model: linear layers by path, the modules of a pipeline, one module by another.

Design choices
- Paths are those of the plain model. `torch.compile` (`_orig_mod`), peft (`base_layer`, `PeftModel`) and parallel
  wrappers stand between; they are passed through, and what they wrap is what changes.
- What holds no ordinary floating-point weight is named by its class: layers of other quantization libraries call
  themselves linear and are no place for branches.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm.core.checks import given
from mm.core.errors import UserError
from mm.core.nouns import with_article
from mm.layers.linear import BranchedLinear
from mm.layers.offloading import foreign_forward

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WRAPPERS = {  # class name: where the wrapped module is
    "OptimizedModule": "_orig_mod",
    "PeftModel": "base_model.model",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, out of wrappers of torch.compile, peft and parallel training."""
    while True:
        kinds = [kind.__name__ for kind in type(module).__mro__]
        inner = next((path for name, path in _WRAPPERS.items() if name in kinds), None)
        if inner is None and "BaseTunerLayer" in kinds:
            inner = "base_layer"
        if inner is None:
            return module
        for name in inner.split("."):
            module = getattr(module, name)


def clean(path: str) -> str:
    """A path of `named_modules` as it is in the plain model."""
    return re.sub(r"(^|\.)(?:_orig_mod|base_layer|base_model\.model)(?=\.|$)", "", path).strip(".")


def tuner_paths(root: nn.Module) -> list[str]:
    """The paths of layers that peft has wrapped: each holds its own tensors under `base_layer`, and adapters beside."""
    return [path for path, module in root.named_modules() if hasattr(module, "adapter_layer_names")]


def of_tuner(name: str, wrapped: Iterable[str]) -> bool:
    """Whether a tensor is an adapter's, of a layer at one of the paths that `tuner_paths` gave."""
    return any(name.startswith(f"{path}.") and not name.startswith(f"{path}.base_layer.") for path in wrapped)


def plain_names(state: Mapping[str, Tensor], wrapped: Collection[str]) -> dict[str, Tensor]:
    """A state_dict as that of the model without peft: its names, and no adapters.

    Args:
        state: of a model whose layers peft has wrapped.
        wrapped: as `tuner_paths` gives them.
    """
    return {clean(name): tensor for name, tensor in state.items() if not of_tuner(name, wrapped)}


def linears(root: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The model's linear layers by path; an adapter's own are left out, and a compiler's wrapper is not shown."""
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear) and not re.search(r"\.lora_[AB]\.|lora_magnitude", path):
            yield re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", path).strip("."), module


def roots_of(target: Any) -> dict[str, nn.Module]:
    """A module itself (under the empty name), or a pipeline's modules by name; out of their wrappers.

    Raises:
        UserError: for an object that is neither a module nor a pipeline.
    """
    if isinstance(target, nn.Module):
        return {"": unwrapped(target)}
    parts = getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise UserError(f"{given(target)} is no model; give {_wanted(target)}")
    return {n: unwrapped(m) for n, m in parts.items() if isinstance(m, nn.Module)}


def check_pipeline(target: Any, what: str) -> None:
    """Raises UserError unless an object is a whole pipeline; `what` says what is done with it ("erasing")."""
    roots_of(target)
    if isinstance(target, nn.Module):
        raise UserError(
            f"{given(target)} is one part of a pipeline, and {what} needs the whole, with its tokenizer; give the "
            "pipeline"
        )
    if not callable(target):
        raise UserError(f"{given(target)} cannot draw, and {what} draws; give a pipeline of diffusers")


def _wanted(target: Any) -> str:
    """What is to be given in the place of an object that is no model."""
    if hasattr(target, "pipeline"):
        return "its pipeline (.pipeline)"
    if isinstance(target, str):
        return f"a loaded one, such as mm.load({target!r}).pipeline"
    return "a pipeline of diffusers, or a module of torch"


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path of the plain model; None where there is none."""
    module = unwrapped(root)
    for name in clean(path).split("."):
        inner = getattr(module, name, None)
        if not isinstance(inner, nn.Module):
            return None
        module = unwrapped(inner)
    return module


def locate(roots: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str] | None:
    """Root and path below it: by the component's name; for a bare module the name may be missing or superfluous."""
    candidates: Iterator[tuple[nn.Module, str]] = (
        (root, below)
        for name, root in roots.items()
        for below in ([path, path.partition(".")[2]] if not name else [path.removeprefix(f"{name}.")])
        if below and (not name or path.startswith(f"{name}."))
    )
    return next(((root, below) for root, below in candidates if submodule(root, below) is not None), None)


def swap(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule at `path`."""
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, (nn.ModuleList, nn.Sequential)) and name.isdigit():
        owner[int(name)] = module
    else:
        setattr(owner, name, module)


def _class_of(module: nn.Module) -> str:
    kind = type(module)
    library = kind.__module__.partition(".")[0]
    return kind.__name__ if library in ("torch", "__main__") else f"{kind.__name__} ({library})"


def no_plain_weight(module: nn.Module) -> str:
    """Why a layer's weight is no ordinary floating-point tensor of its shape; empty where it is."""
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{with_article(_class_of(module))}, whose weight is no parameter of its own"
    if type(weight) not in (nn.Parameter, Tensor):
        kind = with_article(type(weight).__name__)
        return f"{with_article(_class_of(module))} whose weight is {kind}, not an ordinary tensor"
    if weight.dtype not in _FLOATS:
        return f"{with_article(_class_of(module))} whose weight is {str(weight.dtype).removeprefix('torch.')}"
    if isinstance(module, nn.Linear) and weight.shape != (module.out_features, module.in_features):
        return f"{with_article(_class_of(module))} whose weight is packed as {tuple(weight.shape)}"
    return ""


def no_branches(module: nn.Module) -> str:
    """Why a layer takes no branches; empty where it does."""
    if isinstance(module, BranchedLinear):
        return ""
    if not isinstance(module, nn.Linear):
        return f"{with_article(_class_of(module))}, not a linear layer"
    if why := no_plain_weight(module):
        return why
    if type(module) is not nn.Linear:
        return f"{with_article(_class_of(module))}, not torch's own nn.Linear"
    return "its forward was replaced by another program" if foreign_forward(module) else ""


def branched(root: nn.Module, path: str) -> BranchedLinear:
    """The layer at `path`, able to hold branches; a plain one is converted in place."""
    layer = submodule(root, path)
    if layer is None:
        raise UserError(f"{type(root).__name__} has no layer {path}")
    if why := no_branches(layer):
        raise UserError(f"{path} is {why}; branches go onto linear layers with ordinary weights")
    assert isinstance(layer, nn.Linear)
    return BranchedLinear.from_linear(layer)
