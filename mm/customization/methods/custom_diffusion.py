"""Custom Diffusion: the maps that read text are learned as a whole, with a row for the new word.

Source: Kumari et al. 2022, arXiv 2212.04488. Its regularization pictures are replaced by the preservation against the
frozen base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.customization.methods.protocol import Job, Learner, sites_of, with_word
from mm.customization.pieces import Branches, FullWeights, check_whole
from mm.layers.surgery import roots_of


class CustomDiffusion:
    """Whole changes of the family's text-reading layers. With `rank` above 0, changes of that rank, also on 4 bits."""

    name = "custom-diffusion"
    defaults: Mapping[str, Any] = {"text_rank": 0, "learning_rate": 5e-4}

    def begin(self, job: Job) -> Learner:
        """Text-reading layers and the word."""
        paths = [site.path for site in sites_of(job.objective, "text")]
        rank = job.settings["text_rank"]
        if rank:
            return Learner(
                job=job,
                pieces=with_word(
                    job,
                    lambda: Branches(job.objective, paths, rank=rank, seed=job.seed, origin=self.name),
                    always=True,
                ),
            )
        check_whole(roots_of(job.objective.pipe), paths, "text_rank=16")
        pieces = with_word(job, lambda: FullWeights(job.objective, paths, seed=job.seed, origin=self.name), always=True)
        return Learner(job=job, pieces=pieces)
