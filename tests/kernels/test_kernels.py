"""The kernels: every backend and every CPU path equals the reference, on random shapes."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CPU, ROUNDINGS, close, make, moved_products, needs_cpu

from mm import kernels
from mm.kernels import dense
from mm.kernels.packing import integers_of

ISAS: list[str] = importlib.import_module("mm.kernels.cpu._native").paths() if CPU else []


@pytest.fixture(params=ISAS)
def isa(request):
    """One path of the C++ backend, if this CPU runs it."""
    from mm.kernels.cpu import _native

    if _native.choose(request.param) != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    _native.choose(os.environ.get("MM_KERNELS_ISA", ""))


def test_packing_round_trips_in_any_shape():
    rng = torch.Generator().manual_seed(0)
    for rows, columns in [(1, 1), (3, 64), (5, 100), (2, 128)]:
        values = torch.randint(-8, 8, (rows, columns), generator=rng)
        packed = kernels.pack_int4(values)
        assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns // 64) * 32)
        assert torch.equal(kernels.unpack_int4(packed)[:, :columns], values.to(torch.int8))
        assert not kernels.unpack_int4(packed)[:, columns:].any()


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"in \[-8, 7\], these in \[0, 9\]"):
        kernels.pack_int4(torch.tensor([[0, 9]]))
    with pytest.raises(ValueError, match=r"not \(3,\)"):
        kernels.quantize_weight(torch.zeros(3))


def test_the_layer_is_the_sum_of_its_terms():
    """Against a closed form in float64 that shares no code with the reference."""
    layer = make(5, 7, 130)
    x, smooth = layer.x.double(), layer.smooth.double()
    v = x / smooth
    scale = v.abs().amax(1, keepdim=True) / 127
    values = kernels.unpack_int4(layer.weight)[:, :130].double()
    weight = values * layer.weight_scales.double().repeat_interleave(64, 1)[:, :130]
    branch = ((x @ layer.down.double().T) * layer.branch_scales.double()) @ layer.up.double().T
    want = (v / scale).round() * scale @ weight.T + layer.bias.double() + branch
    with kernels.use_backend("reference"):
        close(kernels.branched_linear(**layer.arguments()), want, dtype=torch.float32)
        exact = kernels.branched_linear(**{**layer.arguments(), "x": x})
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, want)


@pytest.mark.parametrize("bits, group, unsigned, shift", ROUNDINGS)
def test_rounding_errs_by_half_a_step(bits, group, unsigned, shift):
    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(1))
    x = x.abs() - shift if unsigned else x
    values, scales, _ = kernels.quantize_activations(x, bits=bits, group=group, unsigned=unsigned, shift=shift)
    steps = scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)
    assert ((values * steps)[:, :130] - (x + shift)).abs().le(steps[:, :130] * 0.5001).all()
    top = 15 if unsigned else 7 if bits == 4 else 127
    assert values.max() <= top and values.min() >= (0 if unsigned else -top)


@needs_cpu
@pytest.mark.parametrize("bits, group, unsigned, shift", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_equals_the_reference(isa, bits, group, unsigned, shift, dtype):
    for seed, (tokens, inputs) in enumerate([(1, 64), (9, 200), (18, 640)]):
        layer = make(tokens, 4, inputs, dtype=dtype, seed=seed)
        arguments = (layer.x, layer.smooth, layer.down, bits, group, unsigned, shift)
        values, scales, low = kernels.quantize_activations(*arguments)
        with kernels.use_backend("reference"):
            want_values, want_scales, want_low = kernels.quantize_activations(*arguments)
        assert torch.equal(values, want_values) and torch.equal(scales, want_scales)
        close(low, want_low, dtype=torch.float32)


@needs_cpu
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 400),
    rank=st.sampled_from([0, 16, 48]),
    rounding=st.sampled_from(ROUNDINGS),
    weight_bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    extras=st.booleans(),
    seed=st.integers(0, 99),
    path=st.sampled_from(ISAS or ["none"]),
)
def test_layers_of_any_shape_equal_the_reference(
    tokens, outputs, inputs, rank, rounding, weight_bits, dtype, extras, seed, path
):
    from mm.kernels.cpu import _native

    layer = make(tokens, outputs, inputs, rank=rank, dtype=dtype, seed=seed, extras=extras, weight_bits=weight_bits)
    bits, group, unsigned, shift = rounding
    arguments = {**layer.arguments(), "bits": bits, "group": group, "unsigned": unsigned, "shift": shift}
    rounded = (layer.x, layer.smooth, None, bits, group, unsigned, shift)
    _native.choose(path)
    try:
        got, again = kernels.branched_linear(**arguments), kernels.branched_linear(**arguments)
        mine = kernels.quantize_activations(*rounded)[0]
    finally:
        _native.choose("")
    with kernels.use_backend("reference"):
        want = kernels.branched_linear(**arguments)
        values, scales, _ = kernels.quantize_activations(*rounded)
    assert got.dtype == dtype and got.shape == (tokens, outputs)
    assert torch.equal(got, again)
    close(got, want, dtype=dtype, ties=moved_products(layer, mine, values, scales))


@needs_cpu
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 13, 64])
def test_wider_layers_equal_the_reference(isa, tokens, weight_bits):
    """More than one block of rows and of columns."""
    layer = make(tokens, 257, 1088, rank=32, seed=tokens, weight_bits=weight_bits)
    with kernels.use_backend("reference"):
        want = kernels.branched_linear(**layer.arguments())
    close(kernels.branched_linear(**layer.arguments()), want, dtype=torch.float32)


@needs_cpu
@pytest.mark.parametrize("tokens", [1537, 2600])
def test_a_layer_in_stretches_is_the_layer(tokens):
    """So many tokens are rounded and multiplied in turn (kernels/cpu/__init__.py): each comes out as it would alone."""
    layer = make(tokens, 33, 192, rank=16, seed=tokens)
    arguments = layer.arguments()
    alone = [kernels.branched_linear(**arguments | {"x": x.contiguous()}) for x in layer.x.split(700)]
    assert torch.equal(kernels.branched_linear(**arguments), torch.cat(alone))


@needs_cpu
def test_tokens_beyond_the_cache_equal_the_reference():
    """More tokens than are treated at once (12 MiB of them), in a layer of a few outputs."""
    layer = make(1100, 5, 12288, seed=3)
    with kernels.use_backend("reference"):
        want = kernels.branched_linear(**layer.arguments())
        wide = kernels.quantize_activations(layer.x, layer.smooth)[0]
    moved = (kernels.quantize_activations(layer.x, layer.smooth)[0].int() - wide.int()).abs().double()
    steps = (layer.x / layer.smooth).abs().amax(1, keepdim=True).double() / 127
    weight = integers_of(layer.weight).double() * layer.weight_scales.double().repeat_interleave(64, 1)
    close(
        kernels.branched_linear(**layer.arguments()), want, dtype=torch.float32, ties=(moved * steps) @ weight.abs().T
    )


@needs_cpu
def test_extreme_weights_and_activations_do_not_overflow(isa):
    layer = make(2, 33, 256, rank=0, extras=False)
    low, high = (kernels.pack_int4(torch.full((33, 256), value)) for value in (-8, 7))
    x = torch.cat([torch.ones(1, 256), -torch.ones(1, 256)])
    ones = torch.ones_like(layer.weight_scales)
    widest = {value: torch.full((33, 256), value, dtype=torch.int8) for value in (-128, 127)}
    for weight, value in ((low, -8), (high, 7), *((weight, value) for value, weight in widest.items())):
        y = kernels.branched_linear(x, weight, ones)
        torch.testing.assert_close(y, x[:, :1] * (256.0 * value) * torch.ones(1, 33))


@needs_cpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(isa, value):
    layer = make(3, 40, 128, rank=0, extras=False)
    layer.x[1, 5] = value
    y = kernels.branched_linear(**layer.arguments())
    with kernels.use_backend("reference"):
        want = kernels.branched_linear(**layer.arguments())
    assert y[1].isnan().all() and want[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_inputs_that_are_not_rounded_err_less_than_16_bits_do(tokens, weight_bits):
    """Against the closed form in float64; `dense`, which GPUs take, computes in x's type and is held to that."""
    layer = make(tokens, 33, 200, weight_bits=weight_bits)
    weight = (integers_of(layer.weight) * layer.weight_scales.double().repeat_interleave(64, 1))[:, :200]
    x = layer.x.double()
    want = (x + 0.25) / layer.smooth.double() @ weight.T + layer.bias.double()
    want += ((x @ layer.down.double().T) * layer.branch_scales.double()) @ layer.up.double().T
    arguments = {**layer.arguments(), "bits": 16, "shift": 0.25}
    for backend in ("reference", "cpu") if CPU else ("reference",):
        with kernels.use_backend(backend):
            close(kernels.branched_linear(**arguments), want, dtype=torch.float32)
    got = dense.weight_only_linear(*layer.arguments().values(), 0.25)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_product_without_a_kernel_equals_the_reference():
    layer = make(7, 33, 200, weight_bits=8)
    rounded = kernels.quantize_activations(layer.x, layer.smooth, layer.down, group=64)
    values, scales, low = rounded
    rest = (layer.weight, layer.weight_scales, layer.bias, low, layer.up, layer.branch_scales, torch.float32)
    with kernels.use_backend("reference"):
        want = kernels.lowbit_linear(values, scales, *rest)
    close(dense.expanded_lowbit_linear(values, scales, *rest), want, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 16])
def test_sixteen_bit_weights_take_branches_too(dtype, rank):
    layer = make(5, 24, 70, rank=rank, dtype=dtype)
    weight = torch.randn(24, 70, generator=torch.Generator().manual_seed(3)).to(dtype) / 8
    arguments = {**layer.arguments(), "weight": weight, "weight_scales": None}
    with kernels.use_backend("reference"):
        want = kernels.branched_linear(**{**arguments, "x": layer.x.double()})
    got = kernels.branched_linear(**arguments)
    torch.testing.assert_close(got.double(), want, rtol=3e-2, atol=3e-2 if dtype == torch.bfloat16 else 1e-5)


def test_one_quantization_serves_an_input_group():
    """Layers that read the same x: quantized once, each with its share of `low`."""
    layer = make(6, 20, 128, rank=32)
    values, scales, low = kernels.quantize_activations(layer.x, layer.smooth, layer.down)
    parts = [
        kernels.lowbit_linear(
            values, scales, layer.weight, layer.weight_scales, layer.bias, low[:, s], layer.up[:, s],
            layer.branch_scales[s], torch.float32,
        )
        for s in (slice(0, 16), slice(16, 32))
    ]  # fmt: skip
    plain = kernels.lowbit_linear(values, scales, layer.weight, layer.weight_scales, layer.bias, dtype=torch.float32)
    close(parts[0] + parts[1] - plain, kernels.branched_linear(**layer.arguments()), dtype=torch.float32)


@needs_cpu
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_no_legal_input_saturates(isa, tokens):
    """int8 values of -128 too, which this library's own rounding never makes."""
    rng = torch.Generator().manual_seed(tokens)
    ends = torch.tensor([-128, 127], dtype=torch.int8)
    rows = [torch.full((1, 192), end, dtype=torch.int8) for end in (-128, 127)]
    values = torch.cat([*rows, ends[torch.randint(0, 2, (tokens, 192), generator=rng)]])[:tokens]
    wide = torch.cat([*rows, ends[torch.randint(0, 2, (31, 192), generator=rng)]])
    for weight in (wide, kernels.pack_int4(wide.clamp(-8, 7))):
        arguments = (values, torch.ones(tokens, 1), weight, torch.ones(33, 3))
        got = kernels.lowbit_linear(*arguments, dtype=torch.float32)
        assert torch.equal(got, (values.long() @ integers_of(weight).long().T).float())


@needs_cpu
@pytest.mark.parametrize(
    "bits, group, weight_bits, dtype",
    [
        (8, 0, 4, torch.bfloat16),
        (8, 0, 8, torch.float32),
        (8, 64, 8, torch.bfloat16),
        (4, 64, 4, torch.float16),
        (16, 0, 4, torch.float32),
        (16, 0, 8, torch.bfloat16),
    ],
)
def test_a_token_has_the_same_bits_in_any_batch(isa, bits, group, weight_bits, dtype):
    """Alone, at any place of a batch, in whole tiles and rests: branch, bias, smoothing and ragged shapes included."""
    layer = make(1024, 45, 200, rank=32, dtype=dtype, seed=bits, weight_bits=weight_bits)
    arguments = {**layer.arguments(), "bits": bits, "group": group}

    def rows(first, last):
        return kernels.branched_linear(**arguments | {"x": layer.x[first:last].contiguous()})

    whole = rows(0, 1024)
    for size in (1, 2, 3, 4, 5, 7, 9, 16, 64, 300):
        for first in (0, 11, 1024 - size):
            assert torch.equal(rows(first, first + size), whole[first : first + size]), (size, first)


@needs_cpu
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("tokens", [3, 50])
def test_paths_with_vectors_agree_in_every_bit(tokens, weight_bits):
    """They sum in one order. Only the down projection has lanes of a path's own width, so there is no branch here."""
    from mm.kernels.cpu import _native

    layer = make(tokens, 45, 200, rank=0, weight_bits=weight_bits)
    found = {}
    for path in ISAS:
        if path != "portable" and _native.choose(path) == path:
            found[path] = kernels.branched_linear(**layer.arguments())
    _native.choose(os.environ.get("MM_KERNELS_ISA", ""))
    first = next(iter(found.values()), None)
    assert all(torch.equal(y, first) for y in found.values()), list(found)
