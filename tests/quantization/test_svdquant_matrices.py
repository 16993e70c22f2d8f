"""Parts of SVDQuant on matrices, against independent implementations."""

from __future__ import annotations

import pytest
import torch
from tiny_block import correlated

from mm.quantization import numerics as n
from mm.quantization import search

# ---- matrices -------------------------------------------------------------------------------------------------------


def test_low_rank_is_nearly_the_best_one():
    matrix = correlated(60, 90) * torch.linspace(3, 0.01, 90)
    up, down = n.low_rank(matrix, 8, torch.Generator().manual_seed(1))
    assert up.shape == (60, 8)
    assert down.shape == (8, 90)
    best = torch.linalg.svdvals(matrix)[8:].square().sum().sqrt()
    assert (matrix - up @ down).norm() < 1.01 * best
    again = n.low_rank(matrix, 8, torch.Generator().manual_seed(1))
    assert torch.equal(up, again[0])


def test_the_branch_for_some_inputs_is_the_best_one_at_their_outputs():
    x, matrix = correlated(500, 90), torch.randn(60, 90, generator=torch.Generator().manual_seed(3))
    gram = n.Gram(x)
    root = gram.root(0.0)
    torch.testing.assert_close(root @ root.T, x.T @ x / 500, rtol=1e-4, atol=1e-4)

    def error(up: torch.Tensor, down: torch.Tensor) -> float:
        return float((x @ (matrix - up @ down).T).square().sum() / 500)

    generator = torch.Generator().manual_seed(1)
    sizes = torch.linalg.svdvals(matrix @ x.T)  # of the outputs themselves
    best = float(sizes[8:].square().sum() / 500)
    assert error(*n.low_rank_for(matrix, 8, root, generator)) < 1.02 * best
    assert error(*n.low_rank(matrix, 8, generator)) > 1.5 * best
    few = n.Gram(x[:50])  # fewer rows than inputs: each input's size alone
    torch.testing.assert_close(few.root(0.0), x[:50].square().mean(0).sqrt())
    assert error(*n.low_rank_for(matrix, 8, few.root(), generator)) < error(*n.low_rank(matrix, 8, generator))


def test_rounding_keeps_to_the_grid_and_short_last_groups():
    weight = torch.randn(5, 100)
    scales = n.group_scales(weight, 4, torch.float32)
    rounded = n.round_to_nearest(weight, scales, 4)
    for row in range(5):
        for start, stop in ((0, 64), (64, 100)):
            step = weight[row, start:stop].abs().max() / 7
            want = (weight[row, start:stop] / step).round() * step
            torch.testing.assert_close(rounded.dense()[row, start:stop], want)
    assert rounded.packed(4).shape == (5, 64)
    assert rounded.packed(8).shape == (5, 128)


def test_searched_scales_never_err_more():
    weight, importance = torch.randn(20, 128) ** 3, torch.rand(128)
    plain = n.round_to_nearest(weight, n.group_scales(weight, 4, torch.float32), 4).dense()
    better = n.round_to_nearest(weight, n.group_scales(weight, 4, torch.float32, importance), 4).dense()
    assert ((better - weight).square() * importance).sum() < ((plain - weight).square() * importance).sum()


@pytest.mark.parametrize("rows", [50, 20])  # more than inputs and fewer: H is formed, or never
def test_output_error_is_the_error_of_outputs(rows):
    x, error = torch.randn(rows, 30), torch.randn(7, 30)
    gram, hessian, some = n.Gram(x), x.T @ x / rows, torch.tensor([7, 2, 9])
    assert (gram.whole is None) == (rows < 30)
    assert n.output_error(error, gram) == pytest.approx(float((x @ error.T).square().sum() / rows), rel=1e-4)
    torch.testing.assert_close(gram.diagonal(), hessian.diagonal())
    torch.testing.assert_close(gram.part(some), hessian[some][:, some])


def naive_gptq(weight, scales, bits, hessian, damp=0.01):
    """The textbook form: no blocks, no Cholesky of the inverse; the inverse Hessian is updated column by column."""
    columns = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian[order][:, order].double()
    h += torch.eye(columns, dtype=torch.float64) * (damp * float(hessian.diagonal().mean()) + 1e-8)
    inverse, w = torch.linalg.inv(h), weight.double()[:, order].clone()
    steps = scales.double().repeat_interleave(64, 1)[:, :columns][:, order]
    out = torch.zeros_like(w)
    for c in range(columns):
        out[:, c] = (w[:, c] / steps[:, c]).round().clamp(-n.LEVELS[bits], n.LEVELS[bits])
        error = (w[:, c] - out[:, c] * steps[:, c]) / inverse[c, c]
        w -= error[:, None] * inverse[c]
        inverse -= torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        inverse[c], inverse[:, c] = 0, 0
        if c + 1 < columns:
            inverse[c, c] = 1
    back = torch.zeros_like(out)
    back[:, order] = out
    return back


def test_error_feedback_equals_the_textbook_and_beats_rounding():
    x, weight = correlated(400, 150), torch.randn(12, 150)
    gram = n.Gram(x)
    scales = n.group_scales(weight, 4, torch.float32)
    got = n.error_feedback(weight, scales, 4, gram, block=32)
    want = naive_gptq(weight, scales, 4, x.T @ x / 400)
    assert (got.values.double() != want).float().mean() < 0.01  # ties fall either way in other precision
    nearest = n.output_error(weight - n.round_to_nearest(weight, scales, 4).dense(), gram)
    assert n.output_error(weight - got.dense(), gram) < 0.7 * nearest
    spans = n.error_feedback(weight, scales, 4, gram, block=32, span=64)  # cheaper, and still far better than nearest
    assert n.output_error(weight - spans.dense(), gram) < 0.85 * nearest
    assert not torch.equal(spans.values, got.values)


def test_a_span_of_error_feedback_is_that_of_its_columns_alone():
    x, weight = correlated(400, 128), torch.randn(5, 128)
    scales = n.group_scales(weight, 4, torch.float32)
    first = n.Gram(x).diagonal().argsort(descending=True, stable=True)[:64]
    got = n.error_feedback(weight, scales, 4, n.Gram(x), span=64).values[:, first]
    steps = scales.repeat_interleave(64, 1)[:, first]
    hessian = (x.T @ x / 400)[first][:, first].double()
    hessian += torch.eye(64, dtype=torch.float64) * (0.01 * float((x.square().sum(0) / 400).mean()) + 1e-8)
    inverse, w = torch.linalg.inv(hessian), weight.double()[:, first]
    want = torch.zeros_like(w)
    for c in range(64):
        want[:, c] = (w[:, c] / steps[:, c]).round().clamp(-7, 7)
        w = w - ((w[:, c] - want[:, c] * steps[:, c]) / inverse[c, c])[:, None] * inverse[c]
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        inverse[c, c] = 1
    assert (got.double() != want).float().mean() < 0.02


def test_rounded_inputs_are_those_of_the_kernels():
    from mm.kernels import quantize_activations, use_backend

    x = torch.randn(6, 130)
    cases = ((8, 0, False, 0.0), (4, 64, False, 0.0), (8, 64, False, 0.0), (4, 64, True, 4.5))
    for bits, group, unsigned, shift in cases:
        with use_backend("reference"):
            values, scales, _ = quantize_activations(x, None, None, bits, group, unsigned, shift)
        values = values.view(torch.uint8).float() if unsigned else values.float()
        dense = values.view(6, scales.shape[1], -1) * scales[..., None]
        got = n.rounded_inputs(x + shift, bits, group, unsigned)
        torch.testing.assert_close(got, dense.flatten(1)[:, :130], atol=1e-5, rtol=1e-5)


def test_the_candidates_are_the_39_of_the_paper():
    x, w = torch.rand(10) + 0.1, torch.rand(10) + 0.1
    found = search.candidates(x, w)
    pairs = {(round(a, 2), round(b, 2)) for a, b, _ in found}
    assert len(found) == len(pairs) == 39
    assert {(0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.95, 0.05)} <= pairs
    for a, b, factors in found:
        torch.testing.assert_close(factors, x**a / w**b)
    silent = search.candidates(torch.zeros(3), torch.ones(3))
    assert all(torch.equal(factors, torch.ones(3)) for _, _, factors in silent)
