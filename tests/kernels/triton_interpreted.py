"""The Triton backend's arithmetic, in Triton's interpreter: run by `test_triton.py`, in a process of its own.

`TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreted.py` runs it directly.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ROUNDINGS, close, make

from mm import kernels
from mm.kernels.triton import launch, plans

# numpy says of every NaN that it met one
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROOT = Path(__file__).parents[2]
DEFAULT_FOLD_FROM = plans.FOLD_FROM
assert launch.INTERPRETED, "set TRITON_INTERPRET=1 before triton is imported"


@pytest.fixture(autouse=True, scope="module")
def _on_triton():
    """The exact kernels, except where a test asks for the folded one."""
    with kernels.use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "FOLD_FROM", 1024)
        yield


def test_more_than_few_tokens_are_folded_by_default(monkeypatch):
    layer = make(70, 20, 640, rank=0, extras=False)
    exact = kernels.branched_linear(**layer.arguments())
    monkeypatch.setattr(plans, "FOLD_FROM", DEFAULT_FOLD_FROM)
    whole = kernels.branched_linear(**layer.arguments())
    assert not torch.equal(exact, whole) and (exact - whole).norm() / exact.norm() < 0.01
    few = {**layer.arguments(), "x": layer.x[:64]}
    close(kernels.branched_linear(**few), reference(kernels.branched_linear, **few), dtype=torch.float32)


def reference(op, *arguments, **named):
    with kernels.use_backend("reference"):
        return op(*arguments, **named)


@pytest.mark.parametrize("bits, group, unsigned, shift", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_equals_the_reference_to_the_bit(bits, group, unsigned, shift, dtype):
    for seed, (tokens, inputs, rank) in enumerate([(1, 64, 16), (9, 200, 0), (18, 320, 48)]):
        layer = make(tokens, 4, inputs, rank=rank, dtype=dtype, seed=seed, extras=seed > 0)
        arguments = (layer.x, layer.smooth, layer.down, bits, group, unsigned, shift)
        values, scales, low = kernels.quantize_activations(*arguments)
        want_values, want_scales, want_low = reference(kernels.quantize_activations, *arguments)
        assert torch.equal(values, want_values) and torch.equal(scales, want_scales)
        close(low, want_low, dtype=torch.float32)


def test_rounding_splits_long_rows_and_high_ranks():
    layer = make(3, 4, 1000, rank=160)
    assert plans.rounding(3, 1024, 160, 0).splits > 1 and plans.rounding(3, 1024, 160, 0).columns < 160
    for group in (0, 64):
        got = kernels.quantize_activations(layer.x, layer.smooth, layer.down, 8, group)
        want = reference(kernels.quantize_activations, layer.x, layer.smooth, layer.down, 8, group)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        close(got[2], want[2], dtype=torch.float32)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    tokens=st.one_of(st.integers(1, 20), st.integers(60, 140)),
    outputs=st.integers(1, 140),
    inputs=st.integers(1, 300),
    rank=st.sampled_from([0, 16, 48]),
    rounding=st.sampled_from(ROUNDINGS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    extras=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers_of_any_shape_equal_the_reference(tokens, outputs, inputs, rank, rounding, dtype, extras, seed):
    layer = make(tokens, outputs, inputs, rank=rank, dtype=dtype, seed=seed, extras=extras)
    bits, group, unsigned, shift = rounding
    arguments = {**layer.arguments(), "bits": bits, "group": group, "unsigned": unsigned, "shift": shift}
    with kernels.use_backend("triton"):
        got, again = kernels.branched_linear(**arguments), kernels.branched_linear(**arguments)
    assert got.dtype == dtype and got.shape == (tokens, outputs)
    assert torch.equal(got, again)
    close(got, reference(kernels.branched_linear, **arguments), dtype=dtype)


@pytest.mark.parametrize(
    "tokens, outputs, inputs",
    [(2, 20, 4200), (20, 40, 4200), (3, 20, 200), (20, 40, 300), (70, 20, 640), (200, 130, 128)],
)
def test_every_exact_kernel_equals_the_reference(tokens, outputs, inputs):
    """Parts along the inputs, and more than one tile of each kernel."""
    if tokens <= plans.FEW:
        assert plans.few(tokens, outputs, inputs).splits > 1 or inputs < 1600
    layer = make(tokens, outputs, inputs, rank=32, seed=tokens)
    close(
        kernels.branched_linear(**layer.arguments()),
        reference(kernels.branched_linear, **layer.arguments()),
        dtype=torch.float32,
    )


def test_layers_of_one_group_share_their_rounding():
    layer = make(6, 20, 128, rank=32)
    values, scales, low = kernels.quantize_activations(layer.x, layer.smooth, layer.down)
    part = slice(16, 32)  # not contiguous, neither in low nor in up
    ends = (layer.bias, low[:, part], layer.up[:, part], layer.branch_scales[part], torch.float32)
    arguments = (values, scales, layer.weight, layer.weight_scales, *ends)
    close(kernels.lowbit_linear(*arguments), reference(kernels.lowbit_linear, *arguments), dtype=torch.float32)


def folded(monkeypatch, layer):
    """(the folded product, the reference's, a bound on their difference)"""
    monkeypatch.setattr(plans, "FOLD_FROM", 1)
    values, scales, low = kernels.quantize_activations(layer.x, layer.smooth, layer.down)
    ends = (layer.bias, low, layer.up, layer.branch_scales) if layer.down is not None else (layer.bias,)
    arguments = (values, scales, layer.weight, layer.weight_scales, *ends)
    steps = layer.weight_scales.float().abs().amax(1) / 16
    bound = (values.double().abs().sum(1, keepdim=True) * scales.double()) * steps.double() / 2
    want = reference(kernels.lowbit_linear, *arguments, dtype=torch.float32)
    return kernels.lowbit_linear(*arguments, dtype=torch.float32), want, bound


@pytest.mark.parametrize("tokens, outputs, inputs, rank", [(3, 5, 40, 0), (130, 140, 200, 48), (20, 40, 640, 16)])
def test_folding_stays_within_its_bound(monkeypatch, tokens, outputs, inputs, rank):
    layer = make(tokens, outputs, inputs, rank=rank, seed=tokens)
    got, want, bound = folded(monkeypatch, layer)
    close(got, want, dtype=torch.float32, ties=bound)
    assert not torch.equal(got, want)  # it is not the exact kernel that ran
    assert ((got - want).norm() / want.norm()) < 0.01  # far below the 4 bits' own error, about 0.1
    monkeypatch.setenv("MM_KERNELS_EXACT", "1")
    close(folded(monkeypatch, layer)[0], want, dtype=torch.float32)


def test_folding_by_powers_of_two_is_exact(monkeypatch):
    layer = make(5, 48, 320, rank=16)
    rng = torch.Generator().manual_seed(1)
    values = torch.randint(-8, 8, (48, 320), generator=rng)  # -8 included
    powers = torch.randint(-4, 1, (48, 5), generator=rng)
    powers[:, 2] = 0
    scales = (0.013 * (1 + torch.arange(48)[:, None] / 7) * 2.0**powers).bfloat16()
    layer = type(layer)(**{**layer.arguments(), "weight": kernels.pack_int4(values), "weight_scales": scales})
    got, want, _ = folded(monkeypatch, layer)
    close(got, want, dtype=torch.float32)
    weight, channel = launch.fold(layer.weight, scales)
    assert torch.equal(weight.float() * channel[:, None], values * scales.float().repeat_interleave(64, 1))


def test_folding_takes_outputs_of_zeros_and_spoils_those_that_are_no_numbers(monkeypatch):
    layer = make(2, 4, 128, rank=0, extras=False)
    layer.weight_scales[0] = 0
    layer.weight_scales[1, 1] = float("nan")
    layer.weight_scales[2, 0] = float("inf")
    got, want, _ = folded(monkeypatch, layer)
    assert not got[:, 0].any() and not want[:, 0].any()
    assert not got[:, 1:3].isfinite().any() and not want[:, 1:3].isfinite().any()
    assert got[:, 3].isfinite().all()


@pytest.mark.parametrize("fold_from", [1, 9999])
@pytest.mark.parametrize("tokens", [2, 70])
def test_extreme_values_do_not_overflow(monkeypatch, tokens, fold_from):
    monkeypatch.setattr(plans, "FOLD_FROM", fold_from)
    x = torch.ones(tokens, 256)
    x[1::2] = -1
    for value in (-8, 7):
        weight = kernels.pack_int4(torch.full((33, 256), value))
        y = kernels.branched_linear(x, weight, torch.ones(33, 4))
        torch.testing.assert_close(y, x[:, :1] * (256.0 * value) * torch.ones(1, 33))


@pytest.mark.parametrize("fold_from", [1, 9999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(monkeypatch, value, fold_from):
    monkeypatch.setattr(plans, "FOLD_FROM", fold_from)
    layer = make(3, 40, 128, rank=0, extras=False)
    layer.x[1, 5] = value
    for group in (0, 64):
        y = kernels.branched_linear(**layer.arguments(), group=group)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_no_tokens_and_any_leading_shape():
    layer = make(6, 20, 70)
    y = kernels.branched_linear(**layer.arguments())
    folded_shape = kernels.branched_linear(**{**layer.arguments(), "x": layer.x.view(2, 3, 70)})
    assert torch.equal(folded_shape, y.view(2, 3, 20))
    assert kernels.branched_linear(**{**layer.arguments(), "x": layer.x[:0]}).shape == (0, 20)
    values, scales, low = kernels.quantize_activations(layer.x[:0], layer.smooth, layer.down)
    assert values.shape == (0, 128) and scales.shape == (0, 1) and low.shape == (0, 16)


def test_a_token_does_not_depend_on_its_neighbours():
    """Tiles and splits are one for up to 16 tokens."""
    layer = make(16, 40, 1100, rank=16)
    values, scales, low = kernels.quantize_activations(layer.x, layer.smooth, layer.down)
    ends = (layer.up, layer.branch_scales, torch.float32)
    together, alone = (
        kernels.lowbit_linear(values[:n], scales[:n], layer.weight, layer.weight_scales, layer.bias, low[:n], *ends)
        for n in (16, 1)
    )
    assert torch.equal(together[:1], alone)


def test_spans_cover_a_length_and_none_is_empty():
    for length in (1, 5, 48, 49):
        for splits in (1, 2, 7, 100):
            each, parts = plans.span(length, splits)
            assert each * parts >= length > each * (parts - 1)


def test_the_benchmark_runs(tmp_path, monkeypatch):
    """Its whole path but the CUDA graph, with both products of many tokens."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(plans, "FOLD_FROM", 70)
    file = tmp_path / "linear.json"
    import linear_gpu

    linear_gpu.main(f"--device cpu --shapes 48x128 --tokens 1 70 --rounds 1 --json {file}".split())
    few, many = json.loads(file.read_text())["rows"]
    assert few["tokens"] == 1 and set(few["speedup"]) >= set(linear_gpu.METHODS)
    assert few["off_reference"]["mm, fused branch"] < 0.006 and many["off_reference"]["mm, scaled by group"] < 0.006
    assert 0.001 < many["off_reference"]["mm, fused branch"] < 0.02
