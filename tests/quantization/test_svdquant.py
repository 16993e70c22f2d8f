"""SVDQuant on matrices against independent implementations, and on modules: determinism, resuming, clear errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_block import INPUTS, SMALL, block, correlated
from torch import nn

import mm
from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear
from mm.models.velocity import VelocityDecoder
from mm.quantization import auto, calibration, search
from mm.quantization import numerics as n
from mm.quantization.config import SVDQuantConfig
from mm.quantization.report import layer_bytes

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


def solved(after: str | None = None, bits: int = 4, **settings):
    x, weight = correlated(300, 128), torch.randn(40, 128, generator=torch.Generator().manual_seed(2))
    x = x if after is None else {"gelu": F.gelu, "silu": F.silu}[after](x)

    def score(dense, up, down, rounder, share):
        rows = x[:: round(1 / share)]
        return float((rounder(rows) @ dense.T + rows @ (up @ down).T - rows @ weight.T).square().sum())

    parent = search.Parent(score=score, calls=8, affordable=100)
    config = SVDQuantConfig(**{"rank": 8, "iterations": 20} | settings)
    return x, weight, search.solve(weight, x, parent, after=after, config=config, bits=bits, dtype=torch.float32)


def test_each_part_of_the_method_lowers_the_error():
    plain = solved(rank=0, smooth=False, gptq=False)[2]
    branch = solved(smooth=False, gptq=False)[2]
    feedback = solved(smooth=False)[2]
    assert plain.error < 1.05 * plain.nearest_error
    assert branch.error < 0.8 * plain.error
    assert feedback.error < 0.8 * branch.error
    assert solved(bits=8)[2].error < 0.02 * feedback.error
    assert 0 < branch.branch_share < 1
    assert branch.turns > 1


def test_smoothing_pays_where_inputs_are_rounded_to_4_bits():
    def outcome(smooth: bool) -> float:
        x, weight, solution = solved(smooth=smooth, activation_bits=4)
        layer = BranchedLinear.from_linear(nn.Linear(128, 40, bias=False))
        layer.quantize_(
            solution.integers.packed(4), solution.integers.scales, smooth=solution.smooth, down=solution.down,
            up=solution.up, activation=solution.rule,
        )  # fmt: skip
        with torch.no_grad():
            return float((layer(x) - x @ weight.T).square().mean())

    assert outcome(True) < 0.8 * outcome(False)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_the_shift_lifts_an_activation_above_zero(name):
    x = {"gelu": F.gelu, "silu": F.silu}[name](torch.linspace(-20, 20, 200001))
    # SiLU's is the published one, which leaves half a percent below zero; that rounds to zero anyway.
    assert abs(float((x + search.SHIFTS[name]).min())) < 6e-3


# ---- choosing bits --------------------------------------------------------------------------------------------------


def test_bits_that_are_wanted_come_first_where_they_fit():
    errors = {"a": {4: 1.0, 8: 0.1, 16: 0.0}, "b": {4: 9.0, 8: 0.1, 16: 0.0}}
    sizes = {name: {4: 4, 8: 8, 16: 16} for name in errors}
    assert auto.allot(errors, sizes, 12 / 32) == {"a": 4, "b": 8}
    assert auto.allot(errors, sizes, 12 / 32, {"a": 8}) == {"a": 8, "b": 4}
    assert auto.allot(errors, sizes, 16 / 32, {"a": 8}) == {"a": 8, "b": 8}
    assert auto.allot(errors, sizes, 8 / 32, {"a": 8}) == {"a": 4, "b": 4}


def test_bits_go_where_errors_are_within_the_budget():
    sizes = {name: {4: 30, 8: 55, 16: 100} for name in "abc"}
    errors = {"a": {4: 1.0, 8: 0.1, 16: 0.0}, "b": {4: 0.2, 8: 0.01, 16: 0.0}, "c": {4: 0.01, 8: 0.001, 16: 0.0}}
    assert auto.allot(errors, sizes, 0.3) == {"a": 4, "b": 4, "c": 4}
    assert auto.allot(errors, sizes, 0.4) == {"a": 8, "b": 4, "c": 4}
    assert auto.allot(errors, sizes, 0.5) == {"a": 8, "b": 8, "c": 4}
    assert auto.allot(errors, sizes, 1.0) == {"a": 16, "b": 16, "c": 16}


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:mm.families")
def test_a_module_is_quantized_in_place_and_nearly_the_same():
    model = block()
    wanted = [model(**item) for item in INPUTS]
    report = mm.quantize(model, SMALL, calibration=INPUTS, progress=False)
    changed = {path for path, m in model.named_modules() if isinstance(m, BranchedLinear)}
    assert changed == {"attn.to_q", "attn.to_k", "attn.to_v", "up", "down"}
    assert [layer.path for layer in report.layers] == [f"model.{p}" for p, _ in model.named_modules() if p in changed]
    for item, want in zip(INPUTS, wanted, strict=True):
        assert (model(**item) - want).norm() < 0.15 * want.norm()
    assert report.ratio == pytest.approx(
        sum(2 * m.in_features * m.out_features for m in model.modules() if isinstance(m, BranchedLinear))
        / sum(layer_bytes(m) for m in model.modules() if isinstance(m, BranchedLinear))
    )
    assert all(layer.error < layer.nearest_error for layer in report.layers)


def test_what_wants_more_than_4_bits_gets_8_and_no_branch():
    torch.manual_seed(0)
    decoder = VelocityDecoder(feature_width=64, width=64, depth=1, heads=2)
    report = mm.quantize(decoder, SVDQuantConfig(rank=4, data_free=True), progress=False)
    found = {layer.path.removeprefix("model.layers.0."): (layer.bits, layer.rank > 0) for layer in report.layers}
    assert found == {
        "modulation": (8, False),
        "attn.to_q": (4, True),
        "attn.to_k": (4, True),
        "attn.to_v": (4, True),
        "attn.to_out": (4, True),
        "ff.up": (8, False),
        "ff.down": (8, False),
    }
    eight = VelocityDecoder(feature_width=64, width=64, depth=1, heads=2)
    report = mm.quantize(eight, SVDQuantConfig(rank=4, bits=8, data_free=True), progress=False)
    assert all(layer.bits == 8 for layer in report.layers)
    assert next(layer.rank for layer in report.layers if layer.path.endswith("ff.up")) > 0  # all at 8, all as asked


@pytest.mark.filterwarnings("ignore:mm.families")
def test_same_seed_same_bytes_and_a_stopped_run_resumes(tmp_path):
    first, second, third = block(), block(), block()
    report = mm.quantize(first, SMALL, calibration=INPUTS, progress=False, resume=tmp_path)
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) == 3  # q, k and v together; up; down
    parts[0].unlink()
    before = {p: p.stat().st_mtime_ns for p in parts[1:]}
    again = mm.quantize(second, SMALL, calibration=INPUTS, progress=False, resume=tmp_path)
    assert {p: p.stat().st_mtime_ns for p in parts[1:]} == before
    assert again.layers == report.layers
    mm.quantize(third, SMALL, calibration=INPUTS, progress=False)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert torch.equal(tensor, third.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:mm.families")
def test_small_memory_means_more_passes_and_the_same_result():
    one, many, runs = block(), block(), []
    mm.quantize(one, SMALL, calibration=INPUTS, progress=False)

    def counted(model):
        runs.append(1)
        for item in INPUTS:
            model(**item)

    config = dataclasses.replace(SMALL, memory=1)
    mm.quantize(many, config, calibration=counted, progress=False)
    assert len(runs) == 1 + 1 + 3  # tracing, counting, and one pass each for qkv, up and down
    layers = [m for m in many.modules() if isinstance(m, BranchedLinear)]
    assert len(layers) == 5
    for item in INPUTS:
        assert (many(**item) - one(**item)).norm() < 0.15 * one(
            **item
        ).norm()  # other rows are picked from one long run


def test_of_wide_inputs_fewer_rows_are_kept():
    config = SVDQuantConfig(rows=4096)
    assert [calibration.rows_of(k, config) for k in (64, 1024, 2048, 3072, 4096, 15360)] == [
        4096, 4096, 2048, 1365, 1024, 1024,
    ]  # fmt: skip
    assert calibration.rows_of(9000, SVDQuantConfig(rows=1)) == 1


@pytest.mark.filterwarnings("ignore:mm.families")
def test_data_free_auto_and_kept_layers():
    free = block()
    report = mm.quantize(free, SVDQuantConfig(rank=4, data_free=True), progress=False)
    assert all(layer.smooth is None for layer in free.modules() if isinstance(layer, BranchedLinear))
    assert all(math.isfinite(layer.error) for layer in report.layers)
    mixed = block()
    config = SVDQuantConfig(rank=4, bits="auto", size_budget=0.5, rows=64, iterations=5)
    report = mm.quantize(mixed, config, calibration=INPUTS, progress=False)
    assert {layer.bits for layer in report.layers} == {4, 8}
    total = sum(layer.bytes_before for layer in report.layers)
    assert sum(layer.bytes_after for layer in report.layers) <= 0.5 * total
    kept = block()
    mm.quantize(kept, SVDQuantConfig(rank=4, data_free=True, keep=["^up$"]), progress=False)
    assert not isinstance(kept.up, BranchedLinear)
    assert isinstance(kept.down, BranchedLinear)


@pytest.mark.filterwarnings("ignore:mm.families")
def test_wrong_input_is_named():
    with pytest.raises(UserError, match="calibration is missing"):
        mm.quantize(block())
    with pytest.raises(UserError, match="keyword arguments of its calls, not str"):
        mm.quantize(block(), calibration=["a cat"])
    with pytest.raises(UserError, match="calibration is empty"):
        mm.quantize(block(), calibration=[])
    with pytest.raises(ValueError, match="bits 3: weights take 4, 8 or 'auto'"):
        SVDQuantConfig(bits=3)
    with pytest.raises(ValueError, match="needs a budget"):
        SVDQuantConfig(bits="auto")
    with pytest.raises(ValueError, match="no setting rnak"):
        SVDQuantConfig.from_dict({"rnak": 3})
    assert SVDQuantConfig.from_dict(SMALL.to_dict()) == SMALL
