"""Classifier-free guidance over several conditions.

Legend: B pictures, N branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mm.core.errors import UserError
from mm.families.mm_tiny import GUIDANCE
from mm.models.cache import PromptCache

# Share of `guidance_scale - 1` that is applied in codes mode, where features are mixed: the default becomes 3 there.
CODES_GUIDANCE = 2 / (GUIDANCE - 1)
Weight = Callable[[float], float]


class GuidanceBranches:
    """The conditions that one step is computed for, and how the results are mixed.

    The mix is `sum_i w_i out_i` with weights that add up to 1. The first branch is the full condition, and its weight
    follows from the others'. Guidance with scale s is two branches: the prompt, and the empty prompt with weight 1 - s.

    Args:
        full: The cache of the full condition.
        others: Caches of the other branches, and their weights as functions of the guidance scale.
        scale: The guidance scale at the start.
        complete: Whether the weights are right for every scale, so that the scale may change between steps.
    """

    def __init__(
        self,
        full: PromptCache,
        others: Sequence[tuple[PromptCache, Weight]],
        *,
        scale: float,
        complete: bool,
    ) -> None:
        self.full = full
        self.cache = PromptCache.cat([full, *(cache for cache, _ in others)]) if others else full
        self.weights = [weight for _, weight in others]
        self.scale, self.complete = scale, complete

    def __len__(self) -> int:
        return 1 + len(self.weights)

    def mix(self, out: torch.Tensor, scale: float, share: float | torch.Tensor = 1.0) -> torch.Tensor:
        """Mixes the branches' outputs.

        Args:
            out: Outputs (N * B, ...), branch after branch.
            scale: The guidance scale now.
            share: Share of the other branches' weights that counts, or a tensor of shares that fits the outputs; 0
                takes the first branch alone.

        Raises:
            UserError: The scale was changed in a run that computes too few branches for that.
        """
        if scale != self.scale and not self.complete:
            raise UserError(
                f"guidance_scale cannot become {scale} in a run that began with {self.scale}, which left out a branch"
            )
        first, *others = out.chunk(len(self))
        full = first
        for other, weight in zip(others, self.weights, strict=True):
            first = first + share * weight(scale) * (other - full)
        return first


def text_branches(prompts: PromptCache, unconditional: PromptCache, scale: float) -> GuidanceBranches:
    """The prompts alone where the scale is at most 1, else the prompts against the unconditional prompt."""
    if scale <= 1:
        return GuidanceBranches(prompts, [], scale=scale, complete=False)
    others = [(unconditional, lambda now: 1 - now if now > 1 else 0.0)]
    return GuidanceBranches(prompts, others, scale=scale, complete=True)
