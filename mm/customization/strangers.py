"""Prompts with other new words, which an adapter must leave to the adapters that bring them.

An adapter that is held to the base on known words alone also acts on the words of other adapters, which are as new to
the base as its own. A sum of such adapters then draws mixtures. The prompts here are the captions with another name in
the place of the subject's, and the adapter is held to the base on them as on unrelated prompts.

Design choices
- Where the name has a row of its own in the embeddings, another name gets rows that are drawn anew each time, of the
  norm of the learned row and in part in its direction: the rows of other adapters are not known.
- Where names are written with the words of an open vocabulary, other names are made up of syllables.
- Methods that train rows alone change nothing else, and need none of this.

Legend: B prompts, V words, D width of an embedding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from mm.customization.batches import hash_of
from mm.customization.captions import names as holds
from mm.customization.captions import renamed
from mm.customization.data import Example
from mm.customization.methods.protocol import Learner
from mm.customization.pieces import Branches
from mm.customization.rows import Rows

_SYLLABLES = ("ba", "do", "fi", "gu", "ka", "lo", "mi", "ne", "po", "ru", "sa", "te", "vi", "wo", "xu", "zy")
_NAMES = 12  # made-up names
_SHARED = 0.7  # largest share of the learned row's direction in another word's row
_NORMS = (0.6, 1.2)  # of another word's row, as shares of the learned row's


class Strangers:
    """Captions under other names.

    Args:
        learner: with the subject's name and its captions.
        seed: of names and rows.

    Attributes:
        prompts: to hold to the base; empty where nothing but rows is trained.
    """

    def __init__(self, learner: Learner, seed: int) -> None:
        job = learner.job
        self.seed, self.rows, self.own = seed, None, _own_rows(learner)
        self.prompts: list[str] = []
        self._means: dict[str, Tensor] = {}
        if job.kind not in ("subject", "style") or not any(isinstance(piece, Branches) for piece in learner.pieces):
            return
        names = _made_up(job.name, seed)
        if self.own is not None:
            names = [f"<{names[0]}>"]
            self.rows = Rows(job.objective, {names[0]: job.noun}, seed=seed)
            # the embeddings are frozen, so that their means are the same at each step
            for table in self.rows.tables:
                weight_VD = self.rows.embedding(table).weight.detach()
                self._means[table.embedding] = weight_VD[: self.rows.ids[table.embedding, names[0]]].float().mean(0)
        self.prompts = _renamed(job.examples, job.name, names)

    def draw(self, number: int, count: int) -> None:
        """Draws the rows of other words for the prompts (count) of step `number`."""
        if self.rows is None or self.own is None:
            return
        generator = torch.Generator().manual_seed(hash_of(self.seed + 2, number))
        for embedding, token in self.rows.values:
            own_D = next(value for (name, _), value in self.own.values.items() if name == embedding).detach()
            self.rows.per_sample[f"{embedding} {token}"] = others(own_D, self._means[embedding], count, generator)

    def remove(self) -> None:
        """Takes the other word off the model."""
        if self.rows is not None:
            self.rows.remove()


def others(own_D: Tensor, mean_D: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows (count, D) about the table's mean that other words may have, by the row that one word has."""
    away_D = (own_D - mean_D).cpu()
    norm = away_D.norm().clamp_min(1e-12)
    free_BD = torch.randn(count, len(away_D), generator=generator)
    free_BD = free_BD / free_BD.norm(dim=1, keepdim=True)
    share_B1 = _SHARED * torch.rand(count, 1, generator=generator)
    low, high = _NORMS
    size_B1 = norm * (low + (high - low) * torch.rand(count, 1, generator=generator))
    made_BD = size_B1 * (share_B1 * away_D / norm + (1 - share_B1.square()).sqrt() * free_BD)
    return mean_D + made_BD.to(mean_D)


def _own_rows(learner: Learner) -> Rows | None:
    return next((piece for piece in learner.pieces if isinstance(piece, Rows)), None)


def _renamed(examples: Sequence[Example], name: str, names: Sequence[str]) -> list[str]:
    captions = list(dict.fromkeys(example.caption for example in examples if holds(example.caption, name)))
    return [renamed(caption, name, other) for caption in captions for other in names]


def _made_up(name: str, seed: int) -> list[str]:
    rng = random.Random(f"{seed} {name}")
    made = ["".join(rng.sample(_SYLLABLES, rng.randint(2, 3))) for _ in range(_NAMES)]
    return [other for other in dict.fromkeys(made) if other not in name] or ["another"]
