"""The record of what was baked into a model's weights, by which a patch that is in them already is refused.

Design choices
- Each component keeps digests of the entries that were baked into it, in itself and in its config: a folder that
  `save_pretrained` wrote knows them too, and so does a 4-bit model that was quantized afterwards.
- A digest is of layers and tensors, not of the patch's name: a patch that was read again from its file is the same.
- What an erasure that was baked keeps a model from drawing is kept beside them, by name.
- Weights that were replaced since are recognized by the hash of the base that a patch carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash
from mm.layers.surgery import clean

_KEY, _ERASED = "_mm_baked", "_mm_erased"  # libraries pass over private keys of a config, and keep them
Changes = Sequence[tuple[nn.Module, Entry]]  # layers of a model, each with what changes there


def record(roots: Iterable[nn.Module], changes: Changes, erases: Iterable[str] = ()) -> None:
    """Notes in each component what is in its weights from now on, and the concepts that this erases."""
    for root in roots:
        if mine := _digest(root, changes):
            _note(root, _KEY, (*baked_into(root), mine))
            _note(root, _ERASED, (*erased_from(root), *erases))


def baked_into(root: nn.Module) -> tuple[str, ...]:
    """Digests of what is in a component's weights."""
    return _noted(root, _KEY)


def erased_from(root: nn.Module) -> tuple[str, ...]:
    """The concepts that patches which are in a component's weights erase."""
    return _noted(root, _ERASED)


def _note(root: nn.Module, key: str, values: Iterable[str]) -> None:
    """Keeps texts in a component and its config; nothing where there are none."""
    made = tuple(dict.fromkeys(values))
    if not made:
        return
    root.__dict__[key] = made
    if hasattr(root, "register_to_config"):
        cast(Any, root).register_to_config(**{key: list(made)})
    elif hasattr(getattr(root, "config", None), "to_dict"):
        setattr(root.config, key, list(made))


def _noted(root: nn.Module, key: str) -> tuple[str, ...]:
    config: Any = getattr(root, "config", None)
    kept = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    found = root.__dict__.get(key) or kept
    return tuple(str(one) for one in found) if isinstance(found, list | tuple) else ()


def refuse_baked(name: str, base: str, roots: Iterable[nn.Module], changes: Changes) -> None:
    """Raises UserError where a patch is in the weights of a component already.

    Args:
        name: of the patch, for the message.
        base: the hash of the base that it was made for; a component that still is that base has nothing baked into it.
        roots: the components.
        changes: layers and entries of the patch.
    """
    for root in roots:
        there = baked_into(root)
        if there and _digest(root, changes) in there and not (base and base == base_hash(root)):
            raise UserError(
                f"patch {name!r} is part of the weights of this {type(root).__name__} already (it was baked into "
                "them), and would act twice; leave it out, or give force=True"
            )


def is_baked(roots: Iterable[nn.Module], changes: Changes) -> bool:
    """Whether a patch with these changes was baked into one of the components."""
    return any(there and _digest(root, changes) in there for root in roots for there in [baked_into(root)])


def _digest(root: nn.Module, changes: Changes) -> str:
    """A digest of what changes in a component, by layer; empty where nothing does."""
    paths = {id(module): clean(path) for path, module in root.named_modules()}
    mine = [(paths[id(module)], entry) for module, entry in changes if id(module) in paths]
    digest = hashlib.sha256()
    for path, entry in sorted(mine, key=lambda pair: (pair[0], pair[1].kind)):
        digest.update(f"|{path}|{entry.kind}|{entry.scope}|{entry.scale}".encode())
        for name, tensor in sorted(entry.tensors.items()):
            digest.update(f"|{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest() if mine else ""
