"""PaCA: a random part of each weight's columns is trained, and nothing else.

Source: Woo et al. 2025, "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", arXiv 2503.01905. No second
matrix lies in the way of the gradient, and of a layer's inputs only the chosen ones are kept for it.

Design choices
- The change W[:, chosen] is a branch whose `down` picks the chosen inputs, so that it goes onto 4-bit layers as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm.customization.methods.protocol import Job, Learner, sites_of, with_word
from mm.customization.pieces import Branches, branched_width, layer_seed
from mm.layers.surgery import roots_of


class PaCA:
    """`rank` columns of each layer, chosen at random."""

    name = "paca"
    defaults: Mapping[str, Any] = {"rank": 8, "layers": "all", "learning_rate": 3e-4}

    def begin(self, job: Job) -> Learner:
        """The columns, and the name's row where the vocabulary is closed."""
        paths = [site.path for site in sites_of(job.objective, job.settings["layers"])]
        roots = roots_of(job.objective.pipe)
        downs = {
            path: chosen_inputs(path, branched_width(roots, path), job.settings["rank"], job.seed) for path in paths
        }
        pieces = with_word(
            job,
            lambda: Branches(
                job.objective, paths, rank=job.settings["rank"], seed=job.seed, downs=downs, frozen_down=True,
                origin=self.name,
            ),
        )  # fmt: skip
        return Learner(job=job, pieces=pieces)


def chosen_inputs(path: str, width: int, count: int, seed: int) -> Tensor:
    """Rows of the identity (count, width) that pick inputs of a layer, by its path and the seed alone."""
    chosen = torch.randperm(width, generator=layer_seed(path, seed))[:count].sort().values
    return picks(chosen, width)


def picks(chosen: Tensor, width: int) -> Tensor:
    """Rows of the identity."""
    return torch.nn.functional.one_hot(chosen, width).float()
