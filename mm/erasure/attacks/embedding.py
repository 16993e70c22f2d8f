"""Embedding search: the embeddings of the concept's words are optimized until the patched layers draw it again.

As concept inversion (Pham et al. 2024, arXiv 2308.01508) does with the denoiser's loss: an attacker with the weights.
Here the loss is the distance of the patched layers' outputs to their old outputs for the same prompt (`attacks.sites`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.patch import Patch
from mm.erasure.attacks.protocol import asked, result, shows
from mm.erasure.attacks.sites import Sites
from mm.erasure.gradients import outputs
from mm.erasure.measure import Measurer
from mm.erasure.probes import Probe
from mm.layers.surgery import roots_of


class EmbeddingSearch:
    """Adam on the rows of the prompt's tokens, `iterations` steps each; `rate` in units of the table's deviation."""

    name = "embedding"

    def __init__(self, most: int = 6, iterations: int = 50, rate: float = 0.05) -> None:
        self.most, self.iterations, self.rate = most, iterations, rate

    def run(self, measurer: Measurer, patch: Patch, probes: Sequence[Probe]) -> dict[str, Any]:
        """The share of prompts where optimized embeddings bring the concept back."""
        chosen, pipe = asked(probes, self.most), measurer.pipe
        plain = measurer.labels([p.prompt for p in chosen])
        hits, first, last = [], [], []
        for p in chosen:
            sites = Sites(pipe, patch)
            patch.scale(pipe, 0.0)
            try:
                wanted = outputs(pipe, sites.layers, [p.prompt], grad=False)
            finally:
                patch.scale(pipe, 1.0)
            with _Embeddings(pipe, [p.prompt], self.rate).optimized() as search:
                losses = []
                for _ in range(self.iterations):
                    loss = _distance(outputs(pipe, sites.layers, [p.prompt], grad=True), wanted)
                    losses.append(float(loss.detach()))
                    search.step(loss)
                first.append(losses[0])
                last.append(search.take_best())
                hits.append(shows(p, measurer.labels([p.prompt])[0]))
        mean = [round(sum(x) / max(1, len(x)), 4) for x in (first, last)]
        return result(
            hits, [shows(p, x) for p, x in zip(chosen, plain, strict=True)], iterations=self.iterations,
            distance_before=mean[0], distance_after=mean[1],
        )  # fmt: skip


def _distance(now: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    parts = [(now[p].float() - wanted[p].float()).square().sum() / wanted[p].float().square().sum() for p in wanted]
    return torch.stack(parts).mean()


class _Embeddings:
    """A learned change of the word embeddings at every token of the prompts."""

    def __init__(self, pipe: Any, prompts: Sequence[str], rate: float) -> None:
        sizes = [len(t.get_vocab()) for n, t in pipe.components.items() if "tokenizer" in n and callable(t)]
        self.tables = [
            m for root in roots_of(pipe).values() for m in root.modules()
            if isinstance(m, nn.Embedding) and m.num_embeddings >= min(sizes, default=1 << 30)
        ]  # fmt: skip
        self.rows: dict[int, Tensor] = {}
        self.length: dict[int, int] = {}
        self.sizes: dict[int, float] = {}
        self.rate, self.optimizer = rate, None
        self.best: tuple[float, list[Tensor]] = (float("inf"), [])

    @contextlib.contextmanager
    def optimized(self) -> Iterator[_Embeddings]:
        """The rows act while the context is open."""
        handles = [table.register_forward_hook(self._hook) for table in self.tables]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, table: nn.Embedding, args: Any, out: Tensor) -> Tensor:
        """Adds the rows; a sequence of another length, such as that of the empty prompt, is left alone."""
        key, ids = id(table), args[0]
        if ids.ndim != 2:
            return out
        if key not in self.rows:
            self.rows[key] = torch.zeros(ids.shape[1], out.shape[-1], requires_grad=True)
            self.sizes[key] = float(table.weight.detach().float().square().mean().sqrt())
            self.length[key] = ids.shape[1]
        if ids.shape[1] != self.length[key]:
            return out
        return out + (self.sizes[key] * self.rows[key]).to(out.dtype)

    def step(self, loss: Tensor) -> None:
        """One step of Adam on all rows; the rows of the smallest loss are kept."""
        rows: list[Any] = list(self.rows.values())
        if float(loss.detach()) < self.best[0]:
            self.best = (float(loss.detach()), [row.detach().clone() for row in rows])
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(rows, lr=self.rate)  # type: ignore[assignment]
        for row, grad in zip(rows, torch.autograd.grad(loss, rows, allow_unused=True), strict=True):
            row.grad = torch.zeros_like(row) if grad is None else grad
        self.optimizer.step()  # type: ignore[attr-defined]

    def take_best(self) -> float:
        """Puts the best rows back and returns their loss."""
        for row, best in zip(self.rows.values(), self.best[1], strict=True):
            row.data.copy_(best)
        return self.best[0]
