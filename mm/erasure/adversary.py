"""An adversary that optimizes embeddings against an erasure, and what the edited layers then read.

Legend: B prompts, T tokens, D inputs and N outputs of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.patch import Patch
from mm.erasure.alignment import matched
from mm.erasure.gradients import outputs
from mm.erasure.methods.protocol import Job
from mm.erasure.solver import Features
from mm.layers.surgery import roots_of


class Embeddings:
    """A learned change of the word embeddings at every token of prompts; `rate` in units of the table's deviation."""

    def __init__(self, pipe: Any, rate: float) -> None:
        sizes = [len(t.get_vocab()) for n, t in pipe.components.items() if "tokenizer" in n and callable(t)]
        self.tables = [
            m for root in roots_of(pipe).values() for m in root.modules()
            if isinstance(m, nn.Embedding) and m.num_embeddings >= min(sizes, default=1 << 30)
        ]  # fmt: skip
        self.rows: dict[int, Tensor] = {}
        self.sizes: dict[int, float] = {}
        self.rate = rate
        self.optimizer: torch.optim.Optimizer | None = None
        self.best: tuple[float, list[Tensor]] = (float("inf"), [])

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """The rows act while the context is open."""
        handles = [table.register_forward_hook(self._hook) for table in self.tables]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, table: nn.Module, args: Any, out: Tensor) -> Tensor:
        """Adds the rows; sequences of another shape, such as that of the empty prompt, are left alone."""
        key, ids = id(table), args[0]
        if ids.ndim != 2:
            return out
        if key not in self.rows:
            self.rows[key] = torch.zeros(*ids.shape, out.shape[-1], requires_grad=True)
            self.sizes[key] = float(table.weight.detach().float().square().mean().sqrt())  # type: ignore[operator, union-attr]
        if tuple(ids.shape) != tuple(self.rows[key].shape[:2]):
            return out
        return out + (self.sizes[key] * self.rows[key]).to(out.dtype)

    def step(self, loss: Tensor) -> None:
        """One step of Adam on all rows; the rows of the smallest loss are kept."""
        rows = list(self.rows.values())
        if float(loss.detach()) < self.best[0]:
            self.best = (float(loss.detach()), [row.detach().clone() for row in rows])
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(rows, lr=self.rate)
        for row, grad in zip(rows, torch.autograd.grad(loss, rows, allow_unused=True), strict=True):
            row.grad = torch.zeros_like(row) if grad is None else grad
        self.optimizer.step()

    def take_best(self) -> float:
        """Puts the best rows back and returns their loss."""
        for row, best in zip(self.rows.values(), self.best[1], strict=True):
            row.data.copy_(best)
        return self.best[0]


def distance(now: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """The mean over layers of the squared distance over the wanted outputs' square."""
    parts = [(now[p].float() - wanted[p].float()).square().sum() / wanted[p].float().square().sum() for p in wanted]
    return torch.stack(parts).mean()


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What an attack reached: features for the first path of each group, and its distance before and after."""

    features: dict[str, Features]
    distances: tuple[float, float]


@torch.enable_grad()
def adversarial_features(
    job: Job, patch: Patch, pairs: Sequence[tuple[str, str]], iterations: int, rate: float
) -> Found:
    """Searches embeddings for the targets' prompts under a patch, and records what the edited layers read then.

    Args:
        job: the erasure in the making; its pipeline does not carry the patch.
        patch: the erasure so far.
        pairs: prompts with the target, and with the anchor in its place.
        iterations: of Adam.
        rate: learning rate, in units of the embeddings' deviation.
    """
    targets, pipe = [t for t, _ in pairs], job.pipe
    firsts = {group[0]: job.layers[group[0]] for group in job.groups}
    wanted = outputs(pipe, job.layers, targets, grad=False)
    anchors = outputs(pipe, firsts, [*targets, *[a for _, a in pairs]], grad=False, reads=True)
    search = Embeddings(pipe, rate)
    patch.apply(pipe)
    try:
        edited = {path: _named(pipe, path) for path in job.layers}
        with search.on():
            first = 0.0
            for _ in range(iterations):
                loss = distance(outputs(pipe, edited, targets, grad=True), wanted)
                first = first or float(loss.detach())
                search.step(loss)
            last = search.take_best()
            read = outputs(pipe, {p: edited[p] for p in firsts}, targets, grad=False, reads=True)
    finally:
        patch.undo(pipe)
    features, n = {}, len(pairs)
    for path in firsts:
        rows, goals = [], []
        for i, (target, anchor) in enumerate(pairs):
            here, there = matched(pipe, target, anchor, read[path].shape[1])
            rows.append(read[path][i][here])
            goals.append(anchors[path][n + i][there])
        x, goal = (torch.cat(parts).detach().double().cpu() for parts in (rows, goals))
        features[path] = Features(target_TD=x, anchor_TD=goal, retained_RD=goal[:0])
    return Found(features=features, distances=(round(first, 4), round(last, 4)))


def _named(pipe: Any, path: str) -> nn.Module:
    """The layer at a path below a pipeline, as it is now: applying a patch may replace it."""
    component, _, rest = path.partition(".")
    roots = roots_of(pipe)
    return roots[component].get_submodule(rest) if component in roots else roots[""].get_submodule(path)
