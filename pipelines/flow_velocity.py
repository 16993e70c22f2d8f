"""The velocity at each step of a flow: everything, or what a plan of less work leaves (`mm.pipelines.fast`).

Legend: B pictures, N guidance branches, C = 16 channels, H = W = 8 latents, L = 64 tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mm.core.errors import UserError
from mm.fast.guidance import GuidanceGate
from mm.models.velocity import VelocityDecoder
from mm.pipelines.drawing_parts import DrawingParts
from mm.pipelines.fast import FastFlow, FlowPlan, flow_plan


class FlowVelocity:
    """Computes the guided velocity of each step in turn.

    Args:
        parts: What is drawn with; the `fast` of its run says what may be left out.
        velocity_decoder: Computes the velocity from features.
        sigmas: Noise levels of the steps.

    Raises:
        UserError: Guidance is to depend on the picture, and there are several pictures or other than two branches.
    """

    def __init__(
        self, parts: DrawingParts, velocity_decoder: VelocityDecoder, sigmas: Sequence[torch.Tensor]
    ) -> None:  # fmt: skip
        self.trunk, self.branches, self.run = parts.trunk, parts.branches, parts.run
        self.velocity_decoder, self.sigmas = velocity_decoder, sigmas
        run, branches = parts.run, parts.branches
        fast = run.fast if isinstance(run.fast, FastFlow) else None
        self.plan: FlowPlan | None = None if fast is None else flow_plan(fast, [float(sigma) for sigma in sigmas])
        self.gate: GuidanceGate | None = None
        if self.plan is not None and self.plan.adaptive is not None and len(branches) > 1:
            if len(branches) != 2 or len(branches.full) != 1:
                raise UserError(
                    "fast: threshold and linear decide picture by picture between two predictions; here are "
                    f"{len(branches)} for {len(branches.full)} pictures"
                )
            self.gate = GuidanceGate(self.plan.adaptive, 1)
        self._features: torch.Tensor | None = None

    def __call__(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """The velocity (B, C, H, W), float32, of the latents at a step."""
        branches, scale = self.branches, self.run.guidance_scale
        planned = self.plan is None or step < self.plan.guided
        if not planned:
            return self._velocity(step, latents, 1)
        if self.gate is None or len(branches) == 1:
            return branches.mix(self._velocity(step, latents, len(branches)), scale)
        needed_B = self.gate.needed()
        out = self._velocity(step, latents, 2 if needed_B.all() else 1)
        full, *other = out.chunk(2) if needed_B.all() else (out,)
        rest = self.gate.complete(full.flatten(1), other[0].flatten(1) if other else None, needed_B)
        return branches.mix(torch.cat([full, rest.view_as(full)]), scale)

    def _velocity(self, step: int, latents: torch.Tensor, count: int) -> torch.Tensor:
        """Velocity (count * B, C, H, W) of the first `count` branches."""
        repeated, rows = latents.repeat(count, 1, 1, 1), count * len(latents)
        sigma = self.sigmas[step].expand(rows)
        features = self._features
        shared = self.plan is not None and step not in self.plan.refreshed
        if not shared or features is None or len(features) < rows:
            cache = self.branches.full if count == 1 else self.branches.cache
            features = self._features = self.trunk(repeated.to(self.trunk.dtype), sigma, cache, "flow")
        return self.velocity_decoder(repeated.to(self.velocity_decoder.dtype), sigma, features[:rows]).float()
