"""ClassDiffusion: DreamBooth with a loss that keeps "<mug> cup" near "cup", so that compositions stay learnable.

Source: Huang et al. 2024, arXiv 2405.17532: + weight * (1 - cos(text("<mug> cup"), text("cup"))).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.methods.dreambooth import DreamBooth, branches_and_word
from mm.customization.methods.protocol import Job, Learner


@dataclass(kw_only=True)
class _Learner(Learner):
    weight: float
    anchor: Tensor

    def extra_loss(self) -> Tensor | None:
        mine = self.job.objective.text_features([f"{self.job.name} {self.job.noun}"])
        return self.weight * (1 - torch.cosine_similarity(mine, self.anchor).mean())


class ClassDiffusion:
    """DreamBooth-LoRA, a row for the name, and the semantic loss; needs the subject's class."""

    name = "class-diffusion"
    defaults: Mapping[str, Any] = {**DreamBooth.defaults, "class_weight": 1.0}

    def begin(self, job: Job) -> Learner:
        """As DreamBooth; the class's text features are computed once, by the base."""
        if not job.noun:
            raise UserError("class-diffusion needs the subject's class; give noun='mug' (--noun)")
        with torch.no_grad():
            anchor = job.objective.text_features([job.noun]).detach()
        pieces = branches_and_word(job, always=True)
        return _Learner(job=job, pieces=pieces, weight=float(job.settings["class_weight"]), anchor=anchor)
