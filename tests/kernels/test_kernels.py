"""The kernels: every backend equals the reference, fake versions, refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ROUNDINGS, close, make, moved_products
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mm import kernels
from mm.core.errors import UserError
from mm.kernels import dense, dispatch
from mm.kernels.packing import integers_of

CPU = dispatch.absence("cpu") is None
ISAS = ["avx512", "avx_vnni", "avx2", "portable"]
needs_cpu = pytest.mark.skipif(not CPU, reason="the C++ extension is not built here")


@pytest.fixture(params=ISAS if CPU else [])
def isa(request):
    """One path of the C++ backend, if this CPU runs it."""
    from mm.kernels.cpu import _native

    if request.param not in _native.paths() or _native.choose(request.param) != request.param:
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
    path=st.sampled_from(ISAS),
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


def test_any_leading_shape_and_no_tokens():
    layer = make(6, 20, 70)
    y = kernels.branched_linear(**layer.arguments())
    folded = kernels.branched_linear(**{**layer.arguments(), "x": layer.x.view(2, 3, 70)})
    assert torch.equal(folded, y.view(2, 3, 20))
    assert kernels.branched_linear(**{**layer.arguments(), "x": layer.x[:0]}).shape == (0, 20)


def test_the_ops_pass_torchs_own_check():
    layer = make(4, 20, 100)
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        kernels.quantize_activations, (layer.x, layer.smooth, layer.down, 4, 64, True, 0.2), test_utils=quick
    )
    values, scales, low = kernels.quantize_activations(layer.x, layer.smooth, layer.down)
    lowbit = (values, scales, layer.weight, layer.weight_scales, layer.bias, low, layer.up, layer.branch_scales)
    torch.library.opcheck(kernels.lowbit_linear, (*lowbit, torch.bfloat16), test_utils=quick)
    torch.library.opcheck(torch.ops.mm.branched_linear.default, tuple(layer.arguments().values()))


def test_compiled_code_takes_new_scales_without_compiling_again():
    layer = make(4, 20, 100)
    counts = []

    def backend(graph, _):
        counts.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def layer_of(x, scales):
        return kernels.branched_linear(**{**layer.arguments(), "x": x, "branch_scales": scales}).relu()

    for factor in (1.0, 0.5):
        scales = layer.branch_scales * factor
        want = kernels.branched_linear(**{**layer.arguments(), "branch_scales": scales}).relu()
        assert torch.equal(layer_of(layer.x, scales), want)
    assert len(counts) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 5}, "4 or 8 bits, not 5"),
        ({"group": 32}, r"per group of 64, not 32"),
        ({"unsigned": True}, "unsigned activations take 4 bits, not 8"),
        ({"x": torch.zeros(3, 99)}, r"smooth must have shape \(99,\), not \(100,\)"),
        ({"x": torch.zeros(3, 100, dtype=torch.int64)}, "must be floating point, not torch.int64"),
        ({"weight": torch.zeros(20, 50, dtype=torch.uint8)}, r"must have shape \(N, 64\), not \(20, 50\)"),
        ({"weight_scales": torch.zeros(20, 1)}, r"weight_scales must have shape \(20, 2\), not \(20, 1\)"),
        ({"bias": torch.zeros(19)}, r"bias must have shape \(20,\), not \(19,\)"),
        ({"down": None, "branch_scales": None}, "both down"),
        ({"up": torch.zeros(20, 8)}, r"up must have shape \(20, 16\), not \(20, 8\)"),
        ({"down": torch.zeros(8, 100), "up": torch.zeros(20, 8)}, "multiple of 16, not 8"),
        ({"branch_scales": torch.zeros(8)}, r"branch_scales must have shape \(16,\), not \(8,\)"),
    ],
)
def test_bad_shapes_are_refused_with_their_values(change, message):
    arguments = {**make(3, 20, 100).arguments(), **change}
    with pytest.raises(ValueError, match=message):
        kernels.branched_linear(**arguments)


def test_an_absent_backend_says_so(monkeypatch):
    assert set(kernels.backends()) == {"reference", "cpu", "triton"}
    with (
        pytest.raises(UserError, match="is called 'cuda'; there are reference, cpu, triton"),
        kernels.use_backend("cuda"),
    ):
        pass
    monkeypatch.setattr(dispatch, "absence", lambda name: "no compiler" if name == "cpu" else None)
    with pytest.raises(UserError, match="'cpu' is not here: no compiler"), kernels.use_backend("cpu"):
        pass
    assert dispatch.backend_for(torch.zeros(1)) == "reference"
    monkeypatch.setenv("MM_KERNELS", "cpu")
    with pytest.raises(UserError, match="no compiler"):
        dispatch.backend_for(torch.zeros(1))


@needs_cpu
def test_the_environment_chooses_backend_and_path():
    code = (
        "import torch; from mm.kernels import dispatch, cpu;"
        "print(dispatch.backend_for(torch.zeros(1)), cpu.instruction_set())"
    )
    env = {**os.environ, "MM_KERNELS": "reference", "MM_KERNELS_ISA": "portable"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["reference", "portable"], done.stderr


@pytest.mark.parametrize("backend", ["reference", "cpu"] if CPU else ["reference"])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("tokens, outputs", [(0, 5), (3, 0), (0, 0)])
def test_no_tokens_and_no_outputs(backend, bits, tokens, outputs):
    layer = make(tokens, outputs, 130, rank=16, weight_bits=8 if bits == 8 else 4)
    with kernels.use_backend(backend):
        for weight in (layer.weight, torch.zeros(outputs, 130)):
            scales = layer.weight_scales if weight is layer.weight else None
            arguments = {**layer.arguments(), "weight": weight, "weight_scales": scales}
            assert kernels.branched_linear(**arguments, bits=bits).shape == (tokens, outputs)
    assert dense.weight_only_linear(*layer.arguments().values(), 0.25).shape == (tokens, outputs)


def test_packing_takes_no_outputs():
    packed = kernels.pack_int4(torch.zeros(0, 100, dtype=torch.int8))
    assert packed.shape == (0, 64) and kernels.unpack_int4(packed).shape == (0, 128)
    assert [tuple(made.shape) for made in kernels.quantize_weight(torch.zeros(0, 100))] == [(0, 64), (0, 2)]


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


def test_a_tensor_that_stayed_on_meta_is_an_error():
    """The fake versions return memory that nothing has written; they run as soon as one tensor is on meta."""
    layer = make(3, 20, 100)
    for name, tensor in layer.arguments().items():
        if name != "x":
            with pytest.raises(UserError, match=f"{name} lies on meta, so it was never loaded"):
                kernels.branched_linear(**{**layer.arguments(), name: tensor.to("meta")})
    with pytest.raises(UserError, match="down lies on meta"):
        kernels.quantize_activations(layer.x, layer.smooth, layer.down.to("meta"))
    values, scales, low = kernels.quantize_activations(layer.x, layer.smooth, layer.down)
    with pytest.raises(UserError, match="up lies on meta"):
        kernels.lowbit_linear(
            values, scales, layer.weight, layer.weight_scales, None, low, layer.up.to("meta"), dtype=torch.float32
        )
    with pytest.raises(UserError, match="the input on meta"):
        kernels.branched_linear(**{**layer.arguments(), "x": layer.x.to("meta")})
    everything = {name: tensor.to("meta") for name, tensor in layer.arguments().items()}
    assert kernels.branched_linear(**everything).shape == (3, 20)


@needs_cpu
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("MM_KERNELS_ISA", "bogus", "MM_KERNELS_ISA takes .*avx2.*, not 'bogus'"),
        ("MM_KERNELS", "bogus", "no backend of the kernels is called 'bogus'"),
        pytest.param(
            "MM_KERNELS", "triton", "backend 'triton' is not here: .*MM_KERNELS",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)  # fmt: skip
def test_an_environment_that_names_nothing_is_one_clear_line(name, value, message):
    code = (
        "import torch; from mm.core.errors import UserError\n"
        "try:\n    from mm.kernels import branched_linear as f; f(torch.ones(1, 64), torch.ones(2, 64))\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, name: value})
    assert done.returncode == 0, done.stderr
    assert re.search(message, done.stdout) and len(done.stdout.splitlines()) == 1


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


def test_what_watches_a_call_sees_the_op():
    """A plain call goes past torch's dispatcher; modes, gradients, vmap and the compiler still meet the op."""
    layer = make(4, 20, 100)
    plain = kernels.branched_linear(**layer.arguments())
    seen = []

    class Watcher(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watcher():
        assert torch.equal(kernels.branched_linear(**layer.arguments()), plain)
    assert "mm.branched_linear.default" in seen
    wanted = kernels.branched_linear(**{**layer.arguments(), "x": layer.x.clone().requires_grad_()})
    with pytest.raises(RuntimeError, match="branched_linear"):
        wanted.sum().backward()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(kernels.branched_linear(**layer.arguments()), FakeTensor)
