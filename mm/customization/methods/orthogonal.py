"""Orthogonal adaptation: adapters in subspaces of their own, so that their plain sum merges them.

Source: Po et al. 2023, arXiv 2312.02432: `down` is frozen and taken from one orthogonal basis that all adapters share;
different adapters take different rows of it. Rows that are orthogonal do not keep an adapter from acting on another
one's word, so that it is held to the base on other new words while it is trained (`mm.customization.strangers`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.methods.protocol import Job, Learner, sites_of, with_word
from mm.customization.pieces import Branches, branched_width, layer_seed
from mm.layers.surgery import roots_of

_BASIS = 20231204  # seed of the basis that all adapters share
_ROWS = 1024  # of the basis, at most


class Orthogonal:
    """LoRA whose `down` is a slot of the shared basis. `slot` None takes one by the name's hash."""

    name = "orthogonal"
    defaults: Mapping[str, Any] = {"rank": 8, "layers": "all", "slot": None, "learning_rate": 3e-3, "strangers": 1}

    def begin(self, job: Job) -> Learner:
        """Branches on a slot, and the name's row where the vocabulary is closed."""
        rank = job.settings["rank"]
        paths = [site.path for site in sites_of(job.objective, job.settings["layers"])]
        roots = roots_of(job.objective.pipe)
        widths = {path: branched_width(roots, path) for path in paths}
        slots = min(_ROWS, *widths.values()) // rank
        slot = slot_of(job.name, slots) if job.settings["slot"] is None else job.settings["slot"]
        if not 0 <= slot < slots:
            raise UserError(f"slot is {slot}; with rank {rank} this model has slots 0 to {slots - 1}")
        downs = {path: basis(path, width)[slot * rank : (slot + 1) * rank] for path, width in widths.items()}
        pieces = with_word(
            job,
            lambda: Branches(
                job.objective, paths, rank=rank, seed=job.seed, downs=downs, frozen_down=True, origin=self.name
            ),
        )
        return Learner(job=job, pieces=pieces, settings={"slot": slot})


def slot_of(name: str, slots: int) -> int:
    """A slot by the name."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "big") % max(1, slots)


def basis(path: str, width: int) -> Tensor:
    """Orthogonal rows (at most K, K) that depend on the layer's path alone."""
    generator = layer_seed(path, _BASIS)
    return torch.linalg.qr(torch.randn(width, min(width, _ROWS), generator=generator))[0].T
