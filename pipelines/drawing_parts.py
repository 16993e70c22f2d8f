"""What a batch of pictures is drawn with, in any mode: along the flow, or in codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm.models.trunk import Trunk
from mm.pipelines.guidance import GuidanceBranches
from mm.pipelines.run_state import Run, StepCallback


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawingParts:
    """The same for each loop that draws.

    Attributes:
        trunk: Computes features of the noisy latents, or of the codes so far.
        generators: One a picture.
        branches: The conditions.
        steps: Sampling steps.
        run: State of this run.
        on_step: Called after each step with its number, its timestep and the latents; returns the latents to go on
            with.
    """

    trunk: Trunk
    generators: Sequence[torch.Generator]
    branches: GuidanceBranches
    steps: int
    run: Run
    on_step: StepCallback
