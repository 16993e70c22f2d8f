"""Gradient checkpointing of denoisers: blocks keep their inputs alone, and are computed again for the gradient.

What acts on the blocks (hooks, scales of branches) must act in the gradient's pass as it did before.

Source: Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv 1604.06174. A step takes about a third
longer; activations of a FLUX-sized transformer shrink from tens of GB to a few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm.core.errors import UserError

LARGE = 10**9  # parameters of a denoiser whose blocks are computed again where nothing else is asked for


class Inputs:
    """Bytes of the inputs that computed-again blocks have kept since `clear`."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def clear(self) -> None:
        """Forgets what has been counted."""
        self.seen.clear()

    @property
    def bytes(self) -> int:
        """Of different storages."""
        return sum(self.seen.values())

    def __call__(self, block: Any, *given: Any) -> Any:
        """Runs a block as diffusers' `gradient_checkpointing_func` does."""
        for tensor in tensors_in(given):
            storage = tensor.untyped_storage()
            self.seen[storage.data_ptr()] = storage.nbytes()
        run = block.__call__ if isinstance(block, nn.Module) else block
        return checkpoint(run, *given, use_reentrant=False)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in tuples and lists of them (a UNet's skip connections)."""
    for value in values:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def size_of(module: nn.Module) -> int:
    """Parameters of a module, biases of linear layers left out. Low-bit weights count as before they were packed."""
    return sum(
        part.in_features * part.out_features
        if isinstance(part, nn.Linear)
        else sum(p.numel() for p in part.parameters(recurse=False))
        for part in module.modules()
    )


def is_wanted(modules: Sequence[nn.Module], asked: bool | None) -> bool:
    """Whether blocks are computed again: as asked, else where denoisers have `LARGE` parameters.

    Raises:
        UserError: it is asked for, and the denoiser has no such blocks.
    """
    able = [module for module in modules if getattr(module, "_supports_gradient_checkpointing", False)]
    if asked and not able:
        kinds = ", ".join(type(module).__name__ for module in modules)
        raise UserError(f"{kinds} cannot compute its blocks again (checkpointing); leave the setting out")
    if asked is not None:
        return asked
    return bool(able) and sum(map(size_of, modules)) >= LARGE


@contextmanager
def checkpointed(modules: Sequence[nn.Module], asked: bool | None = None) -> Iterator[Inputs]:
    """Within the context the blocks of denoisers are computed again where `is_wanted` says so.

    Args:
        modules: the denoisers. One on which it was enabled already stays as it is.
        asked: True or False; None: where they are large.

    Yields:
        What counts the inputs that are kept.
    """
    inputs = Inputs()
    with ExitStack() as stack:
        if is_wanted(modules, asked):
            for module in modules:
                model: Any = module
                if getattr(model, "_supports_gradient_checkpointing", False) and not model.is_gradient_checkpointing:
                    model.enable_gradient_checkpointing(inputs)
                    stack.callback(model.disable_gradient_checkpointing)
        yield inputs
