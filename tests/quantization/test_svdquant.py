"""SVDQuant on layers and modules: what each part brings, determinism, resuming, clear errors."""

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
from mm.quantization.config import SVDQuantConfig
from mm.quantization.report import layer_bytes


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
@pytest.mark.parametrize("memory", [1, 1 << 30])  # one pass for each group, or one for all
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_same_seed_same_bytes_and_a_stopped_run_resumes(tmp_path, lost, memory):
    config = dataclasses.replace(SMALL, memory=memory)
    first, second, third = block(), block(), block()
    report = mm.quantize(first, config, calibration=INPUTS, progress=False, resume=tmp_path)
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) == 3  # q, k and v together; up; down
    parts.pop(lost).unlink()
    before = {p: p.stat().st_mtime_ns for p in parts}
    again = mm.quantize(second, config, calibration=INPUTS, progress=False, resume=tmp_path)
    assert {p: p.stat().st_mtime_ns for p in parts} == before
    assert again.layers == report.layers
    mm.quantize(third, config, calibration=INPUTS, progress=False)
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
    with pytest.raises(UserError, match="bits 3: weights take 4, 8 or 'auto'"):
        SVDQuantConfig(bits=3)
    with pytest.raises(UserError, match="needs a budget"):
        SVDQuantConfig(bits="auto")
    with pytest.raises(UserError, match="no setting rnak"):
        SVDQuantConfig.from_dict({"rnak": 3})
    assert SVDQuantConfig.from_dict(SMALL.to_dict()) == SMALL
