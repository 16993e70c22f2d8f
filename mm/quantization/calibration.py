"""What layers read while the model works: rows of their inputs, and calls of the modules that hold them.

Design choices
- Rows and calls are drawn evenly over a run's calls, that is over timesteps, since activations change along them
  (Q-Diffusion, Li et al. 2023, arXiv 2302.04304); which rows, a seeded generator decides.
- A group's inputs are seen at one of its members: they all get the same tensor.
- What is kept of one pass fits into `memory` bytes: groups beyond it wait for another pass over the same prompts, so
  that a model far larger than its calibration still needs only its own weights and little more.

This module does not know what is done with what was seen.
Legend: M rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mm.layers.sites import Site
from mm.quantization.config import SVDQuantConfig

Run = Callable[[], object]
WIDE = 1024  # inputs: of wider ones fewer rows are kept


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
    """What was seen of a group: input rows (M, K) in fp32, and calls of its parent with their outputs."""

    rows: Tensor | None = None
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


def call_sizes(
    root: nn.Module, groups: Sequence[Group], runs: Sequence[Run]
) -> tuple[dict[str, float], dict[str, int]]:
    """From a few runs: calls a run of each group, and how many bytes a call of its parent would keep."""
    counts: dict[str, float] = {}
    sizes: dict[str, int] = {}
    with ExitStack() as stack:
        for group in groups:

            def count(_module: nn.Module, _args: Any, name: str = group.name) -> None:
                counts[name] = counts.get(name, 0.0) + 1 / len(runs)

            hook = root.get_submodule(group.first.path).register_forward_pre_hook(count)
            stack.callback(hook.remove)
        for parent in {group.first.parent for group in groups} - {""}:

            def size(_module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = parent) -> None:
                sizes[name] = max(sizes.get(name, 0), _bytes((args, kwargs, output)))

            hook = root.get_submodule(parent).register_forward_hook(size, with_kwargs=True)
            stack.callback(hook.remove)
        for run in runs:
            run()
    return counts, sizes


def watch(
    root: nn.Module, groups: Sequence[Group], runs: Sequence[Run], counts: dict[str, float], config: SVDQuantConfig
) -> dict[str, Seen]:
    """Runs everything once and keeps rows and calls of `groups`; `counts` = calls a run, from `call_sizes`."""
    seen = {group.name: Seen() for group in groups}
    kept: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    most: dict[str, int] = {}
    with ExitStack() as stack:
        for group in groups:
            total = max(1, round(counts.get(group.name, 1) * len(runs)))
            layer = root.get_submodule(group.first.path)
            assert isinstance(layer, nn.Linear)
            most[group.name] = rows_of(layer.in_features, config)
            keep_rows = _RowKeeper(kept[group.name], -(-most[group.name] // total), config.seed)
            hook = layer.register_forward_pre_hook(keep_rows)
            stack.callback(hook.remove)
            if group.first.parent:
                keeper = _CallKeeper(seen[group.name].calls, total, config.calls)
                hook = root.get_submodule(group.first.parent).register_forward_hook(keeper, with_kwargs=True)
                stack.callback(hook.remove)
        for run in runs:
            run()
    for name, rows in kept.items():
        if rows:
            seen[name].rows = torch.cat(rows)[: 2 * most[name]]
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
