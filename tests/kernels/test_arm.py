"""Arm's paths, compiled by a cross compiler and run in an emulator, against the reference.

Debian's packages `g++-aarch64-linux-gnu` and `qemu-user` are needed; without them the tests are skipped.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import ROUNDINGS, Layer, close, make, moved_products

from mm import kernels
from mm.kernels.packing import padded

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)} here: apt-get install g++-aarch64-linux-gnu qemu-user"
)
SOURCES = ("portable.cpp", "neon_dotprod.cpp", "neon_i8mm.cpp")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def harness(tmp_path_factory) -> Path:
    """The program that runs layers, for 64-bit Arm."""
    made = tmp_path_factory.mktemp("arm") / "harness"
    cpu = ROOT / "kernels" / "cpu"
    options = ["-O1", "-std=c++17", "-static", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas"]
    sources = [str(ROOT / "tests" / "kernels" / "arm_harness.cpp"), *(str(cpu / name) for name in SOURCES)]
    subprocess.run([COMPILER, *options, f"-I{cpu}", "-o", str(made), *sources], check=True)
    return made


def raw(tensor: torch.Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def encoded(layer: Layer, weight_bits: int, bits: int, group: int, unsigned: bool, shift: float) -> bytes:
    (tokens, inputs), outputs = layer.x.shape, len(layer.weight)
    rank = 0 if layer.down is None else len(layer.down)
    shift_bits = struct.unpack("<i", struct.pack("<f", shift))[0]
    flags = [int(tensor is not None) for tensor in (layer.bias, layer.smooth, layer.branch_scales)]
    types = (CODES[layer.x.dtype], CODES[layer.weight_scales.dtype])
    numbers = (tokens, outputs, inputs, rank, bits, group, unsigned, shift_bits, weight_bits, *types, *flags)
    tensors = (layer.x, layer.weight, layer.weight_scales, layer.bias, layer.smooth, layer.down, layer.up)
    return struct.pack("<14q", *numbers) + b"".join(map(raw, (*tensors, layer.branch_scales)))


def cases(count: int) -> list[tuple[Layer, int, tuple[int, int, bool, float]]]:
    rng = random.Random(0)
    made: list[tuple[Layer, int, tuple[int, int, bool, float]]] = []
    for number in range(count):
        sizes = (rng.choice([1, 2, 3, 4, 5, 7, 8, 11]), rng.randint(1, 40), rng.randint(1, 300))
        weight_bits: int = rng.choice([4, 8])
        options: dict[str, Any] = {
            "rank": rng.choice([0, 16, 48]),
            "dtype": rng.choice(list(CODES)),
            "extras": rng.random() < 0.7,
        }
        made.append((make(*sizes, seed=number, weight_bits=weight_bits, **options), weight_bits, rng.choice(ROUNDINGS)))
    return made


@pytest.mark.parametrize("path", ["neon_dotprod", "neon_i8mm", "portable"])
def test_layers_of_any_shape_equal_the_reference(harness, path):
    """The program itself checks that a token has the same bits alone, in pairs and in the whole batch."""
    tried = cases(40)
    given = b"".join(encoded(layer, weight_bits, *rounding) for layer, weight_bits, rounding in tried)
    done = subprocess.run([EMULATOR, "-cpu", "max", str(harness), path], input=given, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    results, at = memoryview(bytearray(done.stdout)), 0
    for layer, _, rounding in tried:
        bits, group, unsigned, shift = rounding
        (tokens, inputs), outputs, dtype = layer.x.shape, len(layer.weight), layer.x.dtype
        got = torch.frombuffer(results, dtype=dtype, count=tokens * outputs, offset=at).view(tokens, outputs)
        at += got.numel() * got.element_size()
        mine = torch.frombuffer(results, dtype=torch.int8, count=tokens * padded(inputs), offset=at).view(tokens, -1)
        at += mine.numel()
        with kernels.use_backend("reference"):
            options = {"bits": bits, "group": group, "unsigned": unsigned, "shift": shift}
            want = kernels.branched_linear(**layer.arguments(), **options)
            values, scales, _ = kernels.quantize_activations(layer.x, layer.smooth, None, **options)
        close(got, want, dtype=dtype, ties=moved_products(layer, mine, values, scales))
    assert at == len(results)


def test_no_legal_weight_overflows(harness):
    """8-bit weights of -128 and 4-bit ones of -8 and 7 with the largest inputs."""
    layers = [make(5, 9, 256, rank=0, extras=False, weight_bits=bits) for bits in (8, 4)]
    layers[0].weight[:] = torch.randint(0, 2, layers[0].weight.shape).mul(255).sub(128).to(torch.int8)
    layers[1].weight[:] = kernels.pack_int4(torch.randint(0, 2, (9, 256)) * 15 - 8)
    for layer in layers:
        layer.x[:] = torch.randint(0, 2, layer.x.shape) * 2.0 - 1
    given = b"".join(encoded(layer, bits, 8, 0, False, 0.0) for layer, bits in zip(layers, (8, 4), strict=True))
    for path in ("neon_dotprod", "neon_i8mm"):
        done = subprocess.run(
            [EMULATOR, "-cpu", "max", str(harness), path], input=given, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr.decode()
        results, at = memoryview(bytearray(done.stdout)), 0
        for layer in layers:
            with kernels.use_backend("reference"):
                want = kernels.branched_linear(**layer.arguments())
            close(
                torch.frombuffer(results, dtype=torch.float32, count=45, offset=at).view(5, 9),
                want,
                dtype=torch.float32,
            )
            at += 45 * 4 + 5 * 256
