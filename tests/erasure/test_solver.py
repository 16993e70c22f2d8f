"""The closed forms of erasure against independent solutions: least squares, projections, brute force."""

from __future__ import annotations

import pytest
import torch

from mm.core.errors import UserError
from mm.erasure import solver
from mm.erasure.methods.rece import widened


def features(targets: int = 5, kept: int = 40, width: int = 12, seed: int = 0) -> solver.Features:
    g = torch.Generator().manual_seed(seed)
    target, anchor, retained = (torch.randn(n, width, generator=g).double() for n in (targets, targets, kept))
    return solver.Features(target_TD=target, anchor_TD=anchor, retained_RD=retained)


def test_ridge_is_the_least_squares_solution():
    """Stacked rows with weights, solved by torch.linalg.lstsq, give the same A."""
    f, strength, preserve, ridge = features(), 2.0, 3.0, 0.1
    size = solver.moment(f.retained_RD).diagonal().mean()
    rows = torch.cat(
        [
            (strength / len(f.target_TD)) ** 0.5 * f.target_TD,
            (preserve / len(f.retained_RD)) ** 0.5 * f.retained_RD,
            (ridge * size) ** 0.5 * torch.eye(12).double(),
        ]
    )
    wanted = torch.zeros(len(rows), 12).double()
    wanted[: len(f.target_TD)] = (strength / len(f.target_TD)) ** 0.5 * (f.anchor_TD - f.target_TD)
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    found = solver.ridge(f, strength=strength, preserve=preserve, ridge=ridge)
    assert torch.allclose(found.change_DD, expected, atol=1e-10)
    assert found.condition >= 1


def test_ridge_maps_targets_onto_anchors_where_nothing_is_kept():
    f = features(targets=4, kept=0)
    found = solver.ridge(f, strength=1.0, preserve=0.0, ridge=1e-9)
    assert torch.allclose(f.target_TD + f.target_TD @ found.change_DD.T, f.anchor_TD, atol=1e-5)
    assert found.target_error < 1e-9


def test_null_space_leaves_retained_features_alone():
    """With retained features in a subspace, the change acts outside of it and still reaches the anchors' free part."""
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=g).double())[0]
    kept = torch.randn(50, 5, generator=g).double() @ basis[:5]
    f = solver.Features(target_TD=features().target_TD, anchor_TD=features().anchor_TD, retained_RD=kept)
    found = solver.null_space(f, threshold=1e-6)
    assert found.retained_error < 1e-14  # squares: as far as second moments are exact
    assert (kept @ found.change_DD.T).norm() < 1e-10 * kept.norm()
    assert found.target_error < 0.1


def test_null_space_keeps_invariant_tokens_exactly():
    f, start = features(kept=0), torch.randn(2, 12, generator=torch.Generator().manual_seed(3)).double()
    found = solver.null_space(f, threshold=1e-6, invariant_RD=start)
    assert (start @ found.change_DD.T).abs().max() < 1e-8


def test_rotation_is_orthogonal_and_the_best_of_many():
    """No random rotation near it has a smaller objective."""
    f, g = features(), torch.Generator().manual_seed(4)
    weight = torch.randn(7, 12, generator=g).double()
    found = solver.rotation(weight, f, strength=1.0, preserve=1.0, ridge=0.01)
    assert torch.allclose(found @ found.T, torch.eye(7).double(), atol=1e-12)
    size = solver.moment(f.retained_RD).diagonal().mean()

    def cost(r: torch.Tensor) -> float:
        moved = (f.target_TD @ weight.T @ r.T - f.anchor_TD @ weight.T).square().sum(1).mean()
        kept = (f.retained_RD @ weight.T @ r.T - f.retained_RD @ weight.T).square().sum(1).mean()
        return float(moved + kept + 0.01 * size * (r @ weight - weight).square().sum())

    for _ in range(50):
        skew = 0.05 * torch.randn(7, 7, generator=g).double()
        assert cost(found) <= cost(torch.matrix_exp(skew - skew.T) @ found) + 1e-9


def test_low_rank_is_the_best_in_its_effect():
    """The error equals the tail of the singular values of A S^(1/2), computed with another square root."""
    f = features(targets=8)
    change = solver.ridge(f, strength=1.0, preserve=1.0, ridge=0.01).change_DD
    second = solver.moment(torch.cat([f.target_TD, f.retained_RD]))
    up, down, lost = solver.low_rank(change, second, 3)
    assert (up.shape, down.shape) == ((12, 3), (3, 12))
    root = torch.linalg.cholesky(second)
    sizes = torch.linalg.svdvals(change @ root)
    assert lost == pytest.approx(float(sizes[3:].norm() / sizes.norm()), rel=1e-6)
    assert float(((change - up @ down) @ root).norm()) == pytest.approx(float(sizes[3:].norm()), rel=1e-6)


def test_features_that_are_not_finite_are_refused():
    f = features()
    with pytest.raises(UserError, match="target features hold NaN"):
        solver.Features(target_TD=f.target_TD * float("nan"), anchor_TD=f.anchor_TD, retained_RD=f.retained_RD)


def test_derived_features_enter_by_their_moments():
    """RECE's rounds on moments equal stacking the derived features themselves."""
    f, g = features(), torch.Generator().manual_seed(5)
    maps = [torch.randn(12, 12, generator=g).double() for _ in range(2)]
    stacked = solver.Features(
        target_TD=torch.cat([f.target_TD, *[f.target_TD @ k.T for k in maps]]),
        anchor_TD=torch.cat([f.anchor_TD] * 3),
        retained_RD=f.retained_RD,
    ).moments
    wide = widened(f.moments, maps)
    assert torch.allclose(wide.target_DD, stacked.target_DD)
    assert torch.allclose(wide.cross_DD, stacked.cross_DD)
    assert wide.gap == pytest.approx(stacked.gap)


def test_errors_are_those_of_the_features():
    f = features()
    found = solver.ridge(f, strength=1.0, preserve=0.5, ridge=0.1)
    moved = f.target_TD + f.target_TD @ found.change_DD.T - f.anchor_TD
    assert found.target_error == pytest.approx(
        float(moved.square().sum() / (f.anchor_TD - f.target_TD).square().sum()), rel=1e-9
    )
    kept = f.retained_RD @ found.change_DD.T
    assert found.retained_error == pytest.approx(float(kept.square().sum() / f.retained_RD.square().sum()), rel=1e-9)
