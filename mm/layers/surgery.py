"""Finds and replaces layers of a model: linear layers by path, the modules of a pipeline, one module by another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear


def linears(root: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The model's linear layers by path; an adapter's own are left out, and its wrapper's inner name is not shown."""
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear) and not re.search(r"\.lora_[AB]\.|lora_magnitude", path):
            yield path, module


def roots_of(target: Any) -> dict[str, nn.Module]:
    """A module itself (under the empty name), or a pipeline's modules by name."""
    if isinstance(target, nn.Module):
        return {"": target}
    return {n: m for n, m in getattr(target, "components", {}).items() if isinstance(m, nn.Module)}


def locate(roots: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str] | None:
    """Root and path below it: by the component's name; for a bare module the name may be missing or superfluous."""
    candidates: Iterator[tuple[nn.Module, str]] = (
        (root, below)
        for name, root in roots.items()
        for below in ([path, path.partition(".")[2]] if not name else [path.removeprefix(f"{name}.")])
        if below and (not name or path.startswith(f"{name}."))
    )
    for root, below in candidates:
        try:
            root.get_submodule(below)
        except AttributeError:
            continue
        return root, below
    return None


def swap(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule at `path`."""
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, (nn.ModuleList, nn.Sequential)) and name.isdigit():
        owner[int(name)] = module
    else:
        setattr(owner, name, module)


def branched(root: nn.Module, path: str) -> BranchedLinear:
    """The layer at `path` with room for branches, put in place of the plain one where it is still that."""
    layer = root.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{path} is a {type(layer).__name__}, not a linear layer; branches go onto linear layers")
    made = BranchedLinear.from_linear(layer)
    if made is not layer:
        swap(root, path, made)
    return made
