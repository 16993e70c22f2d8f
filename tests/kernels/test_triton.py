"""The Triton backend: dispatch, compiled code for every generation of GPU (none needed), and, where there is one, runs.

Its arithmetic is tested in Triton's interpreter by `triton_interpreted.py`. The interpreter is chosen when triton is
imported, hence the process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import ROUNDINGS, close, make

from mm import kernels
from mm.kernels import dispatch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
GPU = dispatch.absence("triton") is None and torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="no NVIDIA GPU of capability 8.0 or newer")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What one block of threads may have, in bytes
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def test_kernels_in_the_interpreter():
    inner = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(inner)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_cuda_tensors_go_to_triton_where_it_is(monkeypatch):
    monkeypatch.delenv("MM_KERNELS", raising=False)
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "absence", lambda name: None)
    assert dispatch.backend_for(x) == "triton"
    assert dispatch.backend_for(SimpleNamespace(device=x.device, dtype=torch.float64)) == "reference"
    monkeypatch.setattr(dispatch, "absence", lambda name: "no GPU" if name == "triton" else None)
    assert dispatch.backend_for(x) == "reference"


@pytest.mark.parametrize(
    "capabilities, why",
    [([], "torch sees no NVIDIA GPU"), ([(9, 0), (7, 5)], "8.0 or newer, and one here has 7.5"), ([(8, 0)], None)],
)
def test_absence_says_why(monkeypatch, capabilities, why):
    from mm.kernels import triton

    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    said = triton.absence()
    assert said is None if why is None else why in said


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_tensors_on_the_cpu_are_refused():
    from mm.kernels.triton import launch

    with pytest.raises(ValueError, match="reads tensors on a GPU, not on cpu"):
        launch.quantize_activations(torch.zeros(2, 64), None, None, 8, 0, False, 0.0)


class Compiler:
    """Runs the ops up to the compiler: launches are compiled for a GPU that is not there, and kept by kernel name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        from mm.kernels.triton import launch

        self.capability, self.wanted, self.found = 90, None, {}
        run = JITFunction.run

        def compile_only(kernel, *args, grid, warmup, **options):
            assert all(size > 0 for size in grid)
            if self.wanted is None or kernel.__name__ in self.wanted:
                self.found[kernel.__name__] = run(kernel, *args, grid=grid, warmup=True, **options)

        fake = SimpleNamespace(
            get_current_device=lambda: self.capability,  # kernels are cached by device
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", self.capability, 32),
        )
        monkeypatch.setattr(driver, "_active", fake)
        monkeypatch.setattr(JITFunction, "run", compile_only)
        monkeypatch.setattr(launch, "_on", lambda tensor: nullcontext())
        monkeypatch.setattr(launch, "_capability", lambda tensor: divmod(self.capability, 10))
        self.launch = launch

    def __call__(
        self,
        capability,
        tokens,
        *,
        outputs=3072,
        inputs=3072,
        rank=32,
        group=0,
        bits=8,
        extras=True,
        only=None,
        dtype=torch.bfloat16,
    ) -> dict[str, str]:
        """PTX of one layer's kernels (`only` some), each of which must fit into the shared memory of the GPU."""
        self.capability, self.wanted, self.found = capability, only, {}

        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype)

        ready = self.launch.quantize_activations(
            empty(tokens, inputs), empty(inputs), empty(rank, inputs) if rank else None, bits, group, False, 0.0
        )
        groups = ready[0].shape[1] // 64
        self.launch.lowbit_linear(
            *ready[:2], empty(outputs, groups * 32, dtype=torch.uint8), empty(outputs, groups),
            empty(outputs) if extras else None, ready[2] if rank else None, empty(outputs, rank) if rank else None,
            empty(rank, dtype=torch.float32) if rank and extras else None, dtype,
        )  # fmt: skip
        for name, kernel in self.found.items():
            assert kernel.metadata.shared <= SHARED_MEMORY[capability], name
        return {name: kernel.asm["ptx"] for name, kernel in self.found.items()}


@pytest.fixture
def compiler(monkeypatch) -> Iterator[Compiler]:
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    return Compiler(monkeypatch)


WGMMA = "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"


def test_hopper_multiplies_8_bit_integers_with_wgmma(compiler):
    ptx = compiler(90, 4096)
    assert set(ptx) == {"survey", "round_rows", "expand", "folded"}
    assert ".target sm_90a" in ptx["folded"]
    assert WGMMA in ptx["folded"] and "cp.async" in ptx["folded"] and "mma.sync" not in ptx["folded"]
    for name in ("round_rows", "expand"):
        assert "fma.rn" not in ptx[name], "a fused multiply-add moves values across a rounding edge"
    for name in ("round_rows", "expand", "survey"):
        assert "div.full" not in ptx[name], "divisions must be IEEE's"


def test_products_scaled_by_group_keep_weights_in_registers(compiler):
    """With wgmma they would go through shared memory, which took up to three times as long on an H100."""
    ptx = compiler(90, 512, group=64, bits=4, extras=False)
    assert set(ptx) == {"survey", "grouped"}
    assert "m16n8k32.row.col.satfinite.s32.s8.s8.s32" in ptx["grouped"] and "wgmma" not in ptx["grouped"]
    assert "fma.rn" not in ptx["survey"] and "div.full" not in ptx["survey"]


def test_few_tokens_read_weights_in_whole_lines(compiler):
    ptx = compiler(90, 1, only={"few"})["few"]
    assert "m16n8k32.row.col.satfinite.s32.s8.s8.s32" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global \[ ?%r\d+ \+ 0 \], \[ ?%rd\d+ \+ 0 \], 0x10", ptx)


def test_sizes_of_one_compile(compiler):
    """Triton makes constants of them, and of absent tensors."""
    assert set(compiler(90, 1, outputs=1, inputs=40, rank=0)) == {"prepare", "few"}
    parts = compiler(90, 64, outputs=64, inputs=6000, only={"few", "combine"})
    assert set(parts) == {"few", "combine"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_high_ranks_fit_into_the_least_shared_memory(compiler, dtype):
    assert "survey" in compiler(89, 17, rank=320, dtype=dtype, only={"survey"})


@pytest.mark.parametrize("capability", [80, 89, 100])
def test_other_generations_compile(compiler, capability):
    for tokens, name in ((16, "few"), (4096, "folded")):
        assert "s32.s8.s8" in compiler(capability, tokens, only={name})[name]


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 300, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_on_a_gpu_equal_the_reference(monkeypatch, tokens, dtype):
    monkeypatch.setenv("MM_KERNELS_EXACT", "1")
    layer = make(tokens, 328, 712, rank=48, dtype=dtype, seed=tokens)
    for settings in ROUNDINGS:
        check_on_gpu(layer, dict(zip(("bits", "group", "unsigned", "shift"), settings, strict=True)))


def check_on_gpu(layer, rounding):
    dtype = layer.x.dtype
    on_gpu = {name: None if value is None else value.cuda() for name, value in layer.arguments().items()}
    got, again = (kernels.branched_linear(**on_gpu, **rounding) for _ in range(2))
    assert torch.equal(got, again)
    with kernels.use_backend("reference"):
        want = kernels.branched_linear(**layer.arguments(), **rounding)
        values, scales, _ = kernels.quantize_activations(layer.x, layer.smooth, layer.down, *rounding.values())
    mine, steps, _ = kernels.quantize_activations(on_gpu["x"], on_gpu["smooth"], on_gpu["down"], *rounding.values())
    assert torch.equal(mine.cpu(), values) and torch.equal(steps.cpu(), scales)
    # tf32 keeps 10 bits of the branch's factors
    slack = 0 if dtype == torch.float32 else 2**-9 * (layer.x.float() @ layer.down.float().T).abs().amax() * 48**0.5
    close(got.cpu(), want, dtype=dtype, ties=slack)


@needs_gpu
@pytest.mark.parametrize("tokens", [1024, 4000])
def test_folding_on_a_gpu_stays_within_its_bound(tokens):
    layer = make(tokens, 1000, 1600, rank=32)
    on_gpu = {name: value.cuda() for name, value in layer.arguments().items()}
    got = kernels.branched_linear(**on_gpu)
    assert torch.equal(got, kernels.branched_linear(**on_gpu))
    values, scales, _ = kernels.quantize_activations(layer.x, layer.smooth)
    bound = values.double().abs().sum(1, keepdim=True) * scales * layer.weight_scales.double().amax(1) / 32
    with kernels.use_backend("reference"):
        want = kernels.branched_linear(**layer.arguments())
    close(got.cpu(), want, dtype=torch.float32, ties=bound)
    assert (got.cpu() - want).norm() / want.norm() < 0.01
