"""The closed forms of erasure: how a linear layer that reads text must change, from features of text.

Design choices
- Everything is solved in float64. The condition number of each system is reported, since a nearly singular one gives a
  patch that is noise.
- A change of the form W' = W (I + A) depends on the features alone, so layers that read the same input share one A.
- Features enter by their second moments alone. These are computed once a layer; everything after that is D x D.
- A is cut to a low rank where it matters least: by its effect on the features that were seen, not by its own norm.

Legend: D width of the features, N outputs of a layer, T target tokens, R retained tokens, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mm.core.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Features that a layer reads, one token a row, float64.

    Args:
        target_TD: of prompts with the concept.
        anchor_TD: of the same prompts with the anchor in its place, token by token.
        retained_RD: of prompts that must not change.
    """

    target_TD: Tensor
    anchor_TD: Tensor
    retained_RD: Tensor

    def __post_init__(self) -> None:
        if self.target_TD.shape != self.anchor_TD.shape or self.target_TD.shape[1:] != self.retained_RD.shape[1:]:
            shapes = [tuple(x.shape) for x in (self.target_TD, self.anchor_TD, self.retained_RD)]
            raise ValueError(f"features of shapes {shapes}: target and anchor must agree, and all in width")
        for name in ("target_TD", "anchor_TD", "retained_RD"):
            if not torch.isfinite(getattr(self, name)).all():
                raise UserError(f"{name.split('_')[0]} features hold NaN or infinity: the model is broken")

    def joined(self, target_TD: Tensor, anchor_TD: Tensor, retained_RD: Tensor) -> Features:
        """These features and more of each kind."""
        return Features(
            target_TD=torch.cat([self.target_TD, target_TD]), anchor_TD=torch.cat([self.anchor_TD, anchor_TD]),
            retained_RD=torch.cat([self.retained_RD, retained_RD]),
        )  # fmt: skip

    @cached_property
    def moments(self) -> Moments:
        """The second moments by which the closed forms see these features."""
        gap_TD = self.anchor_TD - self.target_TD
        retained = moment(self.retained_RD) if len(self.retained_RD) else None
        return Moments(
            target_DD=moment(self.target_TD), cross_DD=moment(gap_TD, self.target_TD),
            gap=float(gap_TD.square().sum(1).mean()), retained_DD=retained,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Second moments of features.

    Args:
        target_DD: E[c c^T] of the target tokens c.
        cross_DD: E[(c* - c) c^T], c* the anchor's token.
        gap: E|c* - c|^2.
        retained_DD: E[c c^T] of the retained tokens; None where there are none.
    """

    target_DD: Tensor
    cross_DD: Tensor
    gap: float
    retained_DD: Tensor | None

    @property
    def kept_DD(self) -> Tensor:
        """What says which directions matter: the retained moment, or where there is none the target's."""
        return self.target_DD if self.retained_DD is None else self.retained_DD

    @property
    def size(self) -> Tensor:
        """The mean of its diagonal, above 0."""
        return self.kept_DD.diagonal().mean().clamp_min(1e-30)


def moments_of(features: Features | Moments) -> Moments:
    """The moments of features, or moments as they are."""
    return features if isinstance(features, Moments) else features.moments


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A change W' = W (I + A), with the error it leaves.

    Args:
        change_DD: A.
        condition: condition number of the system that was solved.
        target_error: squared distance of the changed target features to the anchor's, over that before the change.
        retained_error: squared change of the retained features over their square.
    """

    change_DD: Tensor
    condition: float
    target_error: float
    retained_error: float


def moment(x_TD: Tensor, y_TD: Tensor | None = None) -> Tensor:
    """The mean of x y^T over tokens, (D, D); y defaults to x. Zeros where there are no tokens."""
    y_TD = x_TD if y_TD is None else y_TD
    return x_TD.T @ y_TD / max(1, len(x_TD))


def ridge(
    features: Features | Moments, *, strength: float, preserve: float, ridge: float, extra_DD: Tensor | None = None
) -> Solution:
    """Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761) for many tokens, in the form W' = W (I + A).

    Minimizes, for A, strength mean |c + A c - c*|^2 over target tokens + preserve mean |A c|^2 over retained tokens
    + ridge tr(S) / D |A|^2, where S is the second moment of the retained tokens. The minimum is
    A = strength E[(c* - c) c^T] (strength E[c c^T] + preserve S + ridge tr(S) / D I)^-1.

    Args:
        features: of the layer.
        strength: weight of the target tokens; 0 changes nothing.
        preserve: weight of the retained tokens.
        ridge: weight of keeping A small, relative to the size of the features.
        extra_DD: further second moment of tokens that are weighted like targets and must not move, (D, D).
    """
    m = moments_of(features)
    eye = torch.eye(len(m.target_DD), dtype=m.target_DD.dtype)
    system = strength * m.target_DD + preserve * m.kept_DD + ridge * m.size * eye
    if extra_DD is not None:
        system = system + preserve * extra_DD
    change = torch.linalg.solve(system, strength * m.cross_DD.T).T  # the system is symmetric
    return solution(m, change, system)


def null_space(features: Features, *, threshold: float, invariant_RD: Tensor | None = None) -> Solution:
    """SPEED (ICLR 2026): changes inside the null space of the retained features alone, invariant tokens exactly kept.

    With P the projector on directions in which retained features have a singular value below `threshold` times the
    largest: A = (C* - C) C^T P Q M, M = (C C^T P + I)^-1, Q = I - M C2 (C2^T P M C2)^-1 C2^T P.

    Args:
        features: of the layer.
        threshold: share of the largest singular value of the retained second moment below which a direction is free.
        invariant_RD: tokens that are kept exactly, such as the start token; None for none.
    """
    m = features.moments
    eye = torch.eye(len(m.target_DD), dtype=m.target_DD.dtype)
    free = eye
    if m.retained_DD is not None:
        values, vectors = torch.linalg.eigh(m.retained_DD)
        free = vectors[:, values <= threshold * values.max().clamp_min(1e-30)]
    projector = free @ free.T
    system = m.target_DD @ projector + 1e-3 * m.target_DD.diagonal().mean().clamp_min(1e-30) * eye
    inverse = torch.linalg.inv(system)
    change = m.cross_DD @ projector @ inverse
    if invariant_RD is not None and len(invariant_RD):
        c2 = invariant_RD.T
        inner = c2.T @ projector @ inverse @ c2
        keep = eye - inverse @ c2 @ torch.linalg.pinv(inner) @ c2.T @ projector
        change = m.cross_DD @ projector @ keep @ inverse
    return solution(m, change, system)


def solution(features: Features | Moments, change_DD: Tensor, system_DD: Tensor) -> Solution:
    """A change with its errors on the features it was made from."""
    m = moments_of(features)
    moved = change_DD @ m.target_DD
    after = m.gap + float((moved * change_DD).sum() - 2 * (change_DD * m.cross_DD).sum())
    kept = 0.0
    if m.retained_DD is not None:
        kept = float(((change_DD @ m.retained_DD) * change_DD).sum() / m.retained_DD.trace().clamp_min(1e-30))
    return Solution(
        change_DD=change_DD,
        condition=float(torch.linalg.cond(system_DD)),
        target_error=max(0.0, after / max(m.gap, 1e-30)),
        retained_error=max(0.0, kept),
    )


def rotation(
    weight_ND: Tensor, features: Features | Moments, *, strength: float, preserve: float, ridge: float
) -> Tensor:
    """The orthogonal R (N, N) for W' = R W that moves target outputs to the anchor's and keeps the retained ones.

    Orthogonal Procrustes (Schoenemann 1966), as OCE (ICML 2026) applies it: R = U V^T from the singular value
    decomposition of strength W E[c* c^T] W^T + preserve W S W^T + ridge tr(S) / D W W^T.
    """
    weight, m = weight_ND.double(), moments_of(features)
    inner = strength * (m.cross_DD + m.target_DD) + preserve * m.kept_DD
    inner = inner + ridge * m.size * torch.eye(inner.shape[0], dtype=inner.dtype)
    left, _, right = torch.linalg.svd(weight @ inner @ weight.T)
    return left @ right


def low_rank(change_DD: Tensor, second_DD: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A as up_Dr @ down_rD of rank r, best in its effect on features with second moment S, and the share that is lost.

    Minimizes tr((A - A_r) S (A - A_r)^T): the truncated SVD of A S^(1/2), with S^(1/2) taken off again on the right.

    Returns:
        up (D, r), down (r, D), and the square root of the share of tr(A S A^T) that the truncation loses.
    """
    values, vectors = torch.linalg.eigh(second_DD)
    floor = values.max().clamp_min(1e-30) * 1e-9
    root = values.clamp_min(floor).sqrt()
    left, sizes, right = torch.linalg.svd(change_DD @ (vectors * root), full_matrices=False)
    rank = min(rank, int((sizes > sizes[0].clamp_min(1e-30) * 1e-7).sum()) or 1)
    down = (right[:rank] / root) @ vectors.T
    lost = float(sizes[rank:].norm() / sizes.norm().clamp_min(1e-30))
    balance = sizes[:rank].sqrt()
    return left[:, :rank] * balance, balance[:, None] * down, lost
