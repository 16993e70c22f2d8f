"""Textual Inversion: only the row of a new word is learned.

Source: Gal et al. 2022, arXiv 2208.01618.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.customization.methods.protocol import Job, Learner, word_rows


class TextualInversion:
    """A row for the name in each embedding that reads prompts."""

    name = "textual-inversion"
    defaults: Mapping[str, Any] = {"row_rate": 0.15, "preserve": 0.0, "caption_dropout": 0.0}

    def begin(self, job: Job) -> Learner:
        """The row alone; unrelated prompts cannot change by it, so nothing is preserved."""
        return Learner(job=job, pieces=word_rows(job, always=True))
