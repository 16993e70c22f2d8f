"""What layers read while the model works: rows of their inputs, and calls of the modules that hold them.

Design choices
- Rows and calls are drawn evenly over a run's calls, that is over timesteps, since activations change along them
  (Q-Diffusion, Li et al. 2023, arXiv 2302.04304); which rows, a seeded generator decides.
- A group's inputs are seen at one of its members: they all get the same tensor.
- What is kept of one pass fits into `memory` bytes: groups beyond it wait for another pass over the same prompts, so
  that a model far larger than its calibration still needs only its own weights and little more.
- Of calls with many rows fewer are kept: as many as give `TOKENS` rows for each input, at least `LEAST`. Scoring them
  costs time by the rows, and more of them add no information about the weights.

Legend: M rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.layers.sites import Site
from mm.quantization.config import SVDQuantConfig

Run = Callable[[], object]
WIDE = 1024  # inputs: of wider ones fewer rows are kept
TOKENS = 32  # rows of kept calls for each input that a layer has
LEAST = 4  # calls that are kept however many rows they have


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sites that share an input."""

    name: str
    sites: tuple[Site, ...]

    @property
    def first(self) -> Site:
        return self.sites[0]


@dataclass(kw_only=True)
class Seen:
    """What was seen of a group.

    Attributes:
        rows: of its input, (M, K) in fp32; None where nothing was seen.
        rows_a_call: of the largest call.
        calls: of its parent: arguments, keyword arguments and output.
    """

    rows: Tensor | None = None
    rows_a_call: int = 0
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)


def groups_of(sites: Sequence[Site]) -> list[Group]:
    """Sites by group, in the order of first appearance."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.group, []).append(site)
    return [Group(name=name, sites=tuple(members)) for name, members in found.items()]


def rows_of(in_features: int, config: SVDQuantConfig) -> int:
    """Rows kept of inputs so wide: `config.rows` up to 1024, fewer beyond, down to a quarter of them."""
    return max(-(-config.rows // 4), min(config.rows, config.rows * WIDE // max(in_features, 1)))


def passes(
    root: nn.Module, groups: Sequence[Group], config: SVDQuantConfig, widths: dict[str, int]
) -> list[list[Group]]:
    """Groups split so that what is kept of each pass fits into `config.memory`; `widths`: bytes a parent call keeps."""
    out: list[list[Group]] = [[]]
    used = 0
    for group in groups:
        layer = root.get_submodule(group.first.path)
        assert isinstance(layer, nn.Linear)
        rows = 4 * rows_of(layer.in_features, config) * layer.in_features
        need = rows + config.calls * widths.get(group.first.parent, 0)
        if out[-1] and used + need > config.memory:
            out.append([])
            used = 0
        out[-1].append(group)
        used += need
    return out


@dataclass(kw_only=True)
class Sizes:
    """What a few runs have shown.

    Attributes:
        calls: calls a run, by group.
        rows: rows of the largest call, by group.
        bytes: what a call of the parent would keep, by parent.
    """

    calls: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


def call_sizes(root: nn.Module, groups: Sequence[Group], runs: Iterable[Run], number: int) -> Sizes:
    """Runs a few of the calibration's runs, `number` of them, and counts.

    Raises:
        UserError: where a layer's input is not finite.
    """
    found = Sizes()
    sizes = found.bytes
    with ExitStack() as stack:
        for group in groups:

            def count(_module: nn.Module, args: Any, name: str = group.name, path: str = group.first.path) -> None:
                found.calls[name] = found.calls.get(name, 0.0) + 1 / number
                x = args[0]
                found.rows[name] = max(found.rows.get(name, 0), x.numel() // max(x.shape[-1], 1))
                check_finite(path, x)

            hook = root.get_submodule(group.first.path).register_forward_pre_hook(count)
            stack.callback(hook.remove)
        for parent in {group.first.parent for group in groups} - {""}:

            def size(_module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = parent) -> None:
                sizes[name] = max(sizes.get(name, 0), _bytes((args, kwargs, output)))

            hook = root.get_submodule(parent).register_forward_hook(size, with_kwargs=True)
            stack.callback(hook.remove)
        for run in runs:
            run()
    return found


def check_finite(path: str, x: Tensor) -> None:
    """Raises UserError where a layer's input holds NaN or infinity."""
    if bool(x.isfinite().all()):
        return
    raise UserError(
        f"the input of {path} holds NaN or infinity while calibrating (as {str(x.dtype).removeprefix('torch.')}); "
        "check what was given to calibrate with, or load the model in float32 or bfloat16"
    )


def calls_kept(in_features: int, rows: int, config: SVDQuantConfig) -> int:
    """Calls of a parent that are kept where the largest has `rows` rows: `config.calls`, or fewer of large ones."""
    return min(config.calls, max(LEAST, -(-TOKENS * in_features // max(rows, 1))))


def watch(
    root: nn.Module,
    groups: Sequence[Group],
    runs: Iterable[Run],
    count: int,
    sizes: Sizes,
    config: SVDQuantConfig,
) -> dict[str, Seen]:
    """Runs everything once and keeps rows and calls.

    Args:
        root: the model.
        groups: those to watch.
        runs: all of the calibration.
        count: how many runs there are.
        sizes: from `call_sizes`.
        config: how much is kept.

    Returns:
        What was seen, by group; rows None where a group's layers were not called, or with nothing.

    Raises:
        UserError: where a layer's input is not finite.
    """
    seen = {group.name: Seen(rows_a_call=sizes.rows.get(group.name, 0)) for group in groups}
    kept: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    most: dict[str, int] = {}
    with ExitStack() as stack:
        for group in groups:
            total = max(1, round(sizes.calls.get(group.name, 1) * count))
            layer = root.get_submodule(group.first.path)
            assert isinstance(layer, nn.Linear)
            most[group.name] = rows_of(layer.in_features, config)
            keep_rows = _RowKeeper(kept[group.name], -(-most[group.name] // total), config.seed)
            hook = layer.register_forward_pre_hook(keep_rows)
            stack.callback(hook.remove)
            if group.first.parent:
                wanted = calls_kept(layer.in_features, sizes.rows.get(group.name, 0), config)
                keeper = _CallKeeper(seen[group.name].calls, total, wanted)
                hook = root.get_submodule(group.first.parent).register_forward_hook(keeper, with_kwargs=True)
                stack.callback(hook.remove)
        for run in runs:
            run()
    for name, rows in kept.items():
        if rows:
            found = torch.cat(rows)[: 2 * most[name]]
            check_finite(name, found)
            seen[name].rows = found if len(found) else None  # an expert may be called with no token at all
    return seen


class _RowKeeper:
    """Keeps a few random rows of every call."""

    def __init__(self, rows: list[Tensor], a_call: int, seed: int) -> None:
        self.rows, self.a_call = rows, a_call
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2)
        picks = torch.randperm(len(x), generator=self.generator)[: self.a_call]
        self.rows.append(x[picks.to(x.device)].float())


class _CallKeeper:
    """Keeps `wanted` calls, evenly spread over `total`."""

    def __init__(self, calls: list[Any], total: int, wanted: int) -> None:
        wanted = min(wanted, total)
        self.calls, self.number = calls, 0
        self.chosen = {int((i + 0.5) * total / wanted) for i in range(wanted)}

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.number in self.chosen:
            self.calls.append((_detached(args), _detached(kwargs), _detached(output)))
        self.number += 1


def _detached(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(_detached, value))
    if isinstance(value, list):
        return list(map(_detached, value))
    if isinstance(value, dict) and type(value) is dict:
        return {k: _detached(x) for k, x in value.items()}
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a call's nested arguments or outputs, in order."""
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        return [t for x in value.values() for t in tensors_of(x)]
    if isinstance(value, (tuple, list)):
        return [t for x in value for t in tensors_of(x)]
    return []


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(value))
