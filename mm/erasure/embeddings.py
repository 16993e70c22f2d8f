"""Word embeddings that are optimized against an erasure.

Legend: B prompts, T tokens, N outputs of a layer, D width of an embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
            self.sizes[key] = float(table.weight.detach().float().square().mean().sqrt())  # type: ignore[operator]
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
