"""What linear layers read in calls of a model: which of them read the same input, and which read text.

Design choices
- Names do not say what a layer reads: `to_q` of cross-attention reads something else than `to_k`, and only a call
  shows that. A trace records a fingerprint of every input of every linear layer, in order.
- Two layers share an input when their lists of fingerprints over the whole trace are equal, so that one call with
  equal inputs by chance (an empty prompt, zeros) decides nothing.
- A fingerprint is shape, type, two sums in double precision and a sample of the values. No tensor is kept, so a trace
  of a large model needs no memory, and storage that is used again misleads nobody.

Legend: L tokens, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mm.layers.sites import Site, split_groups
from mm.layers.surgery import linears

_SAMPLED = 64
Print = tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Fingerprints of the inputs of each linear layer by path, in the order of calls, and how many tokens each had.

    Layers that were never called are not in it.
    """

    inputs: dict[str, tuple[Print, ...]]
    tokens: dict[str, frozenset[int]]

    def shared(self, *paths: str) -> bool:
        """Whether all of these layers were called, always with the same inputs."""
        prints = [self.inputs.get(path) for path in paths]
        return all(p is not None and p == prints[0] for p in prints)

    def reading(self, tokens: int) -> frozenset[str]:
        """Layers all of whose inputs had so many tokens: text, where the count is that of the text alone."""
        return frozenset(path for path, counts in self.tokens.items() if counts == {tokens})


def trace(root: nn.Module, runs: Iterable[Callable[[], object]]) -> Trace:
    """Runs calls of a model and records what its linear layers read.

    Args:
        root: the model, or a module that holds several.
        runs: calls, for example `lambda: model(**inputs)`.

    Returns:
        The trace of all runs together.
    """
    inputs: dict[str, list[Print]] = {}
    tokens: dict[str, set[int]] = {}
    with ExitStack() as stack, torch.no_grad():
        for path, layer in linears(root):

            def record(_module: nn.Module, args: tuple[object, ...], path: str = path) -> None:
                if args and isinstance(args[0], Tensor):
                    inputs.setdefault(path, []).append(fingerprint(args[0]))
                    tokens.setdefault(path, set()).add(args[0].shape[-2] if args[0].ndim > 1 else 1)

            stack.callback(layer.register_forward_pre_hook(record).remove)
        for run in runs:
            run()
    return Trace(
        inputs={path: tuple(prints) for path, prints in inputs.items()},
        tokens={path: frozenset(counts) for path, counts in tokens.items()},
    )


def fingerprint(x: Tensor) -> Print:
    """What distinguishes one input from another: shape, type, two sums and sampled values."""
    flat = x.detach().reshape(-1)
    if flat.is_meta or not len(flat):
        return (tuple(x.shape), str(x.dtype))
    picks = flat[:: max(1, len(flat) // _SAMPLED)][: 2 * _SAMPLED].double()
    sums = torch.stack([flat.sum(dtype=torch.float64), flat.abs().sum(dtype=torch.float64)])
    return (tuple(x.shape), str(x.dtype), *torch.cat([sums, picks]).tolist())


def regroup(sites: Sequence[Site], seen: Trace, *, join: bool = False) -> list[Site]:
    """Groups as a trace shows them.

    Args:
        sites: with the groups that rules say.
        seen: a trace of calls of the model.
        join: also join layers of one parent that always read the same input and have the same precision, for models
            whose groups were found by the names of layers only.

    Returns:
        The sites; members of a group that read different inputs, or were never called, are apart.
    """
    wanted = [replace(site, group=_place(site)) for site in sites] if join else list(sites)
    return split_groups(wanted, {path: hash(prints) for path, prints in seen.inputs.items()})


def _place(site: Site) -> str:
    """The group of all low layers of one parent; any other layer keeps its own group."""
    if not site.parent or site.precision != "low" or site.after:
        return site.group
    return f"{site.parent}.in" if site.bits is None else f"{site.parent}.in{site.bits}"
