"""Adaptive Guidance: which pictures still need the unconditional prediction, and what replaces it elsewhere.

Design choices
- Castillo et al. 2023 (arXiv 2312.12487): classifier-free guidance changes little once the conditional and the
  unconditional prediction point the same way. From there on the conditional prediction alone is used, which is half
  the work.
- What the model predicts is compared as it is: noise for noise models, velocity for flow models. The noise that a
  velocity implies is nearly all input at the first steps, so that its cosine says nothing there.
- With `linear` (the paper's LinearAG) the unconditional prediction is estimated by a linear regression on the
  conditional one and the predictions of the step before. The paper fits its coefficients on sampled trajectories. Here
  they are fitted on the picture's own last step that had both predictions, so that no model needs preparing.
- Each picture is decided on its own: a picture does not depend on the others of its batch.

Legend: B pictures, N values of a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from mm.core.errors import UserError

Settings = TypeVar("Settings")
_RIDGE = 1e-6  # of the mean square of the predictors: they are nearly parallel at late steps


@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance:
    """When the unconditional prediction is left out.

    Args:
        threshold: Cosine of the two predictions, above which a picture goes on without; above 1 none ever does.
        linear: Whether left-out predictions are estimated by regression. Every second prediction before the threshold
            is then estimated, too, and guidance acts to the end.
    """

    threshold: float = 0.991
    linear: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float):
            raise UserError(f"threshold is {self.threshold!r}; give a number, for example 0.991")
        if not -1 <= self.threshold <= 2:
            raise UserError(f"threshold is {self.threshold:g}; give a cosine, -1 to 1, or above 1 to leave nothing out")
        if not isinstance(self.linear, bool):
            raise UserError(f"linear is {self.linear!r}; give true or false")


def adaptive_settings(_mode: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of Adaptive Guidance by name, the defaults where they are not given.

    Raises:
        UserError: There is no such setting, or it has no such value.
    """
    return asdict(checked(AdaptiveGuidance, given))


def checked(kind: Callable[..., Settings], given: Mapping[str, Any]) -> Settings:
    """Settings of a dataclass from a mapping. Raises UserError for names that it does not have."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"fast has no setting {str(unknown[0])[:60]!r} here; it takes {', '.join(known)}")
    return kind(**given)


class GuidanceGate:
    """The decisions of one run.

    Args:
        settings: When to leave predictions out.
        pictures: B.
    """

    def __init__(self, settings: AdaptiveGuidance, pictures: int) -> None:
        self.settings = settings
        self.open_B = torch.ones(pictures, dtype=torch.bool)
        self._fitted_B = torch.zeros(pictures, dtype=torch.bool)
        self._estimated_B = torch.zeros(pictures, dtype=torch.bool)  # at the last step
        self._coefficients_B3: torch.Tensor | None = None
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    def needed(self) -> torch.Tensor:
        """Which pictures (B,) need their unconditional prediction at the coming step; on the CPU."""
        if not self.settings.linear:
            return self.open_B.clone()
        return self.open_B & (~self._fitted_B | self._estimated_B)

    def complete(
        self,
        conditional_BN: torch.Tensor,
        unconditional_BN: torch.Tensor | None,
        needed_B: torch.Tensor,
        values: int | None = None,
    ) -> torch.Tensor:
        """The unconditional predictions of a step, estimated where they were left out; decides on the next steps.

        Args:
            conditional_BN: Conditional predictions.
            unconditional_BN: Unconditional ones, with any values where they were left out; None: all were.
            needed_B: What `needed` said.
            values: Compares the first so many of the N; None: all.

        Returns:
            Unconditional predictions (B, N). Without `linear` a picture whose guidance ended gets its conditional one:
            every guidance scale then gives the conditional prediction.
        """
        cond = conditional_BN.float()
        here_B1 = needed_B.to(cond.device)[:, None]
        whole = self._estimate(cond)
        if unconditional_BN is not None:
            whole = torch.where(here_B1, unconditional_BN.float(), whole)
        if self.settings.linear:
            self._fit(cond[:, :values], whole[:, :values], needed_B)
        alike_B = (F.cosine_similarity(cond[:, :values], whole[:, :values], dim=-1) > self.settings.threshold).cpu()
        ending_B = needed_B & alike_B & (self._fitted_B if self.settings.linear else True)
        self.open_B &= ~ending_B
        self._estimated_B = ~needed_B
        self._before = (cond, whole)
        return whole.to(conditional_BN.dtype)

    def _estimate(self, cond: torch.Tensor) -> torch.Tensor:
        if not self.settings.linear or self._before is None or self._coefficients_B3 is None:
            return cond
        made = (self._predictors(cond) * self._coefficients_B3[..., None]).sum(1)
        return torch.where(self._fitted_B.to(cond.device)[:, None], made, cond)

    def _predictors(self, cond: torch.Tensor) -> torch.Tensor:
        """(B, 3, N): this conditional prediction, and both of the step before."""
        assert self._before is not None
        return torch.stack([cond, *(one[:, : cond.shape[1]] for one in self._before)], 1)

    def _fit(self, cond: torch.Tensor, uncond: torch.Tensor, needed_B: torch.Tensor) -> None:
        """Least squares for pictures that have both predictions of this step."""
        if self._before is None:
            return
        x_B3N = self._predictors(cond)
        gram = x_B3N @ x_B3N.mT
        scale = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp_min(1e-20)
        ridge = _RIDGE * scale * torch.eye(3, device=cond.device)
        # towards (1, 0, 0): the conditional prediction itself
        target = x_B3N @ (uncond - cond)[..., None]
        found = torch.linalg.solve(gram + ridge, target)[..., 0] + torch.tensor([1.0, 0.0, 0.0], device=cond.device)
        old = found if self._coefficients_B3 is None else self._coefficients_B3
        self._coefficients_B3 = torch.where(needed_B.to(cond.device)[:, None], found, old)
        self._fitted_B |= needed_B
