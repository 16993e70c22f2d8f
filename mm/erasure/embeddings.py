"""Word embeddings that are optimized against an erasure.

Design choices
- Prompts are searched together: their losses are added up and Adam works on each number alone, so each prompt's search
  is the one that it would be alone. The best rows are kept for each prompt.
- Rows belong to the token numbers that they were made for. A text with other tokens, such as the empty prompt of
  guidance, is read without them, also where it has the same length.

Legend: B prompts, T tokens, N outputs of a layer, D width of an embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm.layers.surgery import roots_of


def word_tables(pipe: Any) -> list[nn.Embedding]:
    """The tables of word embeddings: those with a row for every word of a tokenizer."""
    sizes = [
        len(getattr(t, "tokenizer", t).get_vocab())
        for n, t in pipe.components.items()
        if "tokenizer" in n and callable(t)
    ]
    return [
        m for root in roots_of(pipe).values() for m in root.modules()
        if isinstance(m, nn.Embedding) and m.num_embeddings >= min(sizes, default=1 << 30)
    ]  # fmt: skip


class Embeddings:
    """A learned change of the word embeddings at every token of prompts; `rate` in units of the table's deviation."""

    def __init__(self, pipe: Any, rate: float) -> None:
        self.tables = word_tables(pipe)
        self.rows: dict[int, Tensor] = {}
        self.ids: dict[int, Tensor] = {}
        self.sizes: dict[int, float] = {}
        self.rate = rate
        self.optimizer: torch.optim.Optimizer | None = None
        self.best: list[float] = []
        self.best_rows: list[Tensor] = []

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
        """Adds the rows to the prompts that they belong to."""
        key, ids = id(table), args[0] if args else None
        if ids is None or ids.ndim != 2:
            return out
        if key not in self.rows:
            self.ids[key] = ids.clone()
            self.rows[key] = torch.zeros(*ids.shape, out.shape[-1], device=out.device, requires_grad=True)
            self.sizes[key] = float(table.weight.detach().float().square().mean().sqrt())  # type: ignore[operator]
        if not torch.equal(ids, self.ids[key]):
            return out
        return out + (self.sizes[key] * self.rows[key]).to(out.dtype)

    def step(self, losses_B: Tensor) -> None:
        """One step of Adam on all rows; of each prompt the rows of the smallest loss are kept."""
        rows, now = list(self.rows.values()), losses_B.detach().tolist()
        if not self.best:
            self.best, self.best_rows = [float("inf")] * len(now), [row.detach().clone() for row in rows]
        for b, loss in enumerate(now):
            if loss < self.best[b]:
                self.best[b] = loss
                for kept, row in zip(self.best_rows, rows, strict=True):
                    kept[b] = row.detach()[b]
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(rows, lr=self.rate)
        for row, grad in zip(rows, torch.autograd.grad(losses_B.sum(), rows, allow_unused=True), strict=True):
            row.grad = torch.zeros_like(row) if grad is None else grad
        self.optimizer.step()

    def take_best(self) -> list[float]:
        """Puts the best rows of each prompt back and returns their losses."""
        for row, best in zip(self.rows.values(), self.best_rows, strict=True):
            row.data.copy_(best)
        return self.best


def distances(now: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """For each prompt, (B,): the mean over layers of the squared distance over the wanted outputs' square."""
    parts = []
    for path, goal in wanted.items():
        size = goal.float().square().flatten(1).sum(1)
        parts.append((now[path].float() - goal.float()).square().flatten(1).sum(1) / size.clamp_min(1e-30))
    return torch.stack(parts).mean(0)
