"""DreamBooth-LoRA: low-rank branches on the denoiser's layers, learned with the subject's name in the caption.

Source: Ruiz et al. 2022, arXiv 2208.12242 (DreamBooth); Hu et al. 2021, arXiv 2106.09685 (LoRA). The class is preserved
against the frozen base instead of drawn pictures (`mm.customization.training`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.customization.methods.protocol import Job, Learner, sites_of, with_word
from mm.customization.pieces import Branches, Piece


class DreamBooth:
    """LoRA on attention, or on feed-forward layers too."""

    name = "dreambooth"
    defaults: Mapping[str, Any] = {"rank": 8, "alpha": None, "layers": "all"}

    def begin(self, job: Job) -> Learner:
        """Branches, and the name's row where the vocabulary is closed."""
        return Learner(job=job, pieces=branches_and_word(job))


def branches_and_word(job: Job, *, always: bool = False) -> list[Piece]:
    """Branches by the job's settings, and the name's row where the vocabulary is closed, or `always`."""
    s = job.settings
    paths = [site.path for site in sites_of(job.objective, s["layers"])]
    return with_word(
        job,
        lambda: Branches(
            job.objective, paths, rank=s["rank"], alpha=s["alpha"], seed=job.seed, origin=DreamBooth.name
        ),
        always=always,
    )  # fmt: skip
