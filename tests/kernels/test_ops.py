"""The ops as torch sees them: fake versions, compiled code, refusals, and the choice of a backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from kernel_cases import CPU, make, needs_cpu
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mm import kernels
from mm.core.errors import UserError
from mm.kernels import dense, dispatch


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
