"""4-bit linear layers on an NVIDIA GPU against torch's bf16: `python benchmarks/linear_gpu.py --json linear-gpu.json`.

Design choices
- What is timed is the replay of a CUDA graph, as torch.compile's "reduce-overhead" runs a model: with few tokens,
  starting kernels from Python would cost more than they do. Inputs are bf16, their rounding is inside, and the branch
  has rank 32.
- A graph runs as many copies of a layer as outgrow every cache, so weights come from memory, as they do in a model.
- Every method is timed in turn, round after round, and medians are compared: one run, one temperature.
- Peers: torch fp8 (e4m3, a scale for each row), the int4 product that torchao uses on GPUs (tinygemm, groups of 64) and
  bitsandbytes' NF4. One that is not installed or does not run here is listed with its reason.
- Each row says how far the layer is from `reference` on the same inputs: a fast layer that is wrong shows.

`--device cpu` walks the same path without a GPU, on whatever backend is forced, for a test of this script. Timings of
layers on CPUs are `linear.py`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
from linear import RANK, layer, ours, plain, shapes_of
from linear_peers import Maker, Step
from torch import nn

import mm.kernels as kernels

_CACHE = 128 << 20  # more than any GPU's L2 holds


def exact(linear: nn.Linear) -> Step:
    """The layer of mm with many tokens multiplied by group, not folded."""
    step = ours(linear)

    def call(x: torch.Tensor) -> object:
        with mock.patch.dict(os.environ, {"MM_KERNELS_EXACT": "1"}):
            return step(x)

    return call


BASE = "torch bf16"
METHODS: dict[str, Maker] = {
    BASE: plain,
    "mm, fused branch": ours,
    "mm, no branch": lambda linear: ours(linear, rank=0),
    "mm, unfused branch": lambda linear: ours(linear, fused=False),
    "mm, scaled by group": exact,
}


def fp8(linear: nn.Linear) -> Step:
    """torch's product of 8-bit floats, a scale for each token and output; inputs are rounded inside."""
    weight, scales = _rounded_fp8(linear.weight)

    def call(x: torch.Tensor) -> object:
        values, by_token = _rounded_fp8(x)
        return torch._scaled_mm(values, weight.T, by_token, scales.T, out_dtype=x.dtype)

    return call


def _rounded_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 448
    return (x / scales).to(torch.float8_e4m3fn), scales


def tinygemm(linear: nn.Linear) -> Step:
    """torch's int4 weights in groups of 64 with bf16 inputs, which torchao's layers call on GPUs."""
    outputs, inputs = linear.weight.shape
    values = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=linear.weight.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(values, 8)
    scales = torch.randn(inputs // 64, outputs, 2, device=linear.weight.device).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 64, scales)


def nf4(linear: nn.Linear) -> Step:
    """bitsandbytes' NF4 layer on the device of the weights."""
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    outputs, inputs = linear.weight.shape
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to(linear.weight.device)


PEERS: dict[str, Maker] = {"torch fp8": fp8, "int4 (torchao's)": tinygemm, "NF4 (bitsandbytes)": nf4}
WEIGHT_BYTES = {BASE: 2.0, "torch fp8": 1.0}  # all others hold half a byte


def there(device: str) -> tuple[dict[str, Maker], dict[str, str]]:
    """The methods that run on a device, and why the others do not."""
    found, absent = dict(METHODS), {}
    with torch.no_grad(), torch.device(device):
        for name, make in PEERS.items():
            try:
                out = make(layer(256, 256, torch.bfloat16))(torch.randn(16, 256).bfloat16())
                assert isinstance(out, torch.Tensor) and out.shape == (16, 256)
            except Exception as error:  # any kind of failure of another library
                absent[name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            else:
                found[name] = make
    return found, absent


def runner(steps: list[Step], x: torch.Tensor) -> Callable[[], float]:
    """A function that runs all steps once and returns the seconds a step."""
    if not x.is_cuda:

        def timed() -> float:
            start = time.perf_counter()
            for step in steps:
                step(x)
            return (time.perf_counter() - start) / len(steps)

        return timed
    for step in steps[:2]:
        step(x)  # compiles
    torch.cuda.synchronize()
    graph, start, end = (
        torch.cuda.CUDAGraph(),
        torch.cuda.Event(enable_timing=True),
        torch.cuda.Event(enable_timing=True),
    )
    with torch.cuda.graph(graph):
        for step in steps:
            step(x)

    def replayed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(steps)

    return replayed


def distance(step: Step, x: torch.Tensor) -> float:
    """Relative error against `reference`, computed on the same device."""
    with kernels.use_backend("reference"):
        want = step(x)
    got = step(x)
    assert isinstance(got, torch.Tensor) and isinstance(want, torch.Tensor)
    return float((got.float() - want.float()).norm() / want.float().norm())


def measure(
    shape: tuple[int, int], tokens: int, rounds: int, device: str, methods: dict[str, Maker] | None = None
) -> dict:
    """One row of the table."""
    outputs, inputs = shape
    copies = max(2, -(-_CACHE // (outputs * inputs // 2))) if device == "cuda" and tokens < 256 else 2
    with torch.no_grad(), torch.device(device):
        torch.manual_seed(0)
        x = torch.randn(tokens, inputs).bfloat16()
        layers = [layer(*shape, torch.bfloat16) for _ in range(copies)]
        steps = {name: [make(one) for one in layers] for name, make in (methods or METHODS).items()}
        off = {name: distance(made[0], x) for name, made in steps.items() if name in METHODS and name != BASE}
        runs = {name: runner(made, x) for name, made in steps.items()}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):  # the first is a warm-up
            for name, run in runs.items():
                seconds = run()
                if number:
                    found[name].append(seconds)
    times = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {
        "outputs": outputs,
        "inputs": inputs,
        "tokens": tokens,
        "microseconds": {name: 1e6 * t for name, t in times.items()},
        "speedup": {name: times[BASE] / t for name, t in times.items()},
        "tera_operations": {name: 2e-12 * tokens * outputs * inputs / t for name, t in times.items()},
        "weight_gb_per_second": {
            name: 1e-9 * outputs * inputs * WEIGHT_BYTES.get(name, 0.5) / t for name, t in times.items()
        },
        "off_reference": off,
    }


def table(rows: list[dict]) -> str:
    """Markdown: times as fast as torch's bf16 in the same run, and the fused layer's distance from `reference`."""
    names = [name for name in rows[0]["speedup"] if name != BASE]
    head = ["outputs x inputs", "tokens", "torch bf16, us", *names, "off reference"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [f"{row['outputs']} x {row['inputs']}", str(row["tokens"]), f"{row['microseconds'][BASE]:.1f}"]
        cells += [f"{row['speedup'][name]:.2f}" for name in names]
        lines.append(f"| {' | '.join([*cells, format(row['off_reference']['mm, fused branch'], '.1e')])} |")
    return "\n".join(lines)


def settings(device: str, rounds: int) -> dict:
    """What the figures depend on."""
    versions = {name: metadata.version(name) for name in ("torch", "triton")}
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "device": gpu.name if gpu else "cpu",
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "rank": RANK,
        "rounds": rounds,
        "backends": kernels.backends(),
        **versions,
    }


def main(arguments: list[str] | None = None) -> None:
    """Times everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--shapes", nargs="+", default=["flux"], help="flux, trunk, or OUTPUTSxINPUTS")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and kernels.backends()["triton"] != "ready":
        raise SystemExit(f"the triton backend is not here: {kernels.backends()['triton']}")
    methods, absent = there(options.device)
    for name, why in absent.items():
        print(f"{name} is not here: {why}")
    rows = []
    for shape in (shape for name in options.shapes for shape in shapes_of(name)):
        for tokens in options.tokens:
            rows.append(measure(shape, tokens, options.rounds, options.device, methods))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}")
    if options.json:
        facts = {"rows": rows, "absent": absent, "settings": settings(options.device, options.rounds)}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
