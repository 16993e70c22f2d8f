"""4-bit linear layers against their peers, on this machine: `python benchmarks/linear.py --json linear.json`.

Design choices
- All methods are timed in one run, in turn, round after round, and the medians are compared. What counts is the ratio
  to torch's own layer in the same run. The order is shuffled anew every round: whoever always comes after the one that
  frees the most memory would always pay for its pages.
- The baseline, and the type of the inputs, is bf16 where the CPU computes in it, and fp32 elsewhere: without
  instructions for bf16, torch takes seven times as long in it. `--dtype` overrides what a short trial finds.
- Rounding of the inputs is inside the timing; the branch has rank 32, in bf16 as files have it. With one token the
  weights change from call to call, as they do in a model: what fits into a cache would be timed as if it always did.
- "unfused" is the same 4-bit product with the branch as two products of torch's own beside it.
- What the branch adds is timed among mm's own methods, before any peer's layers are there, and among the peers as well:
  between two of our own methods the peers' memory and threads only stand in the way (they cost several per cent).
- Peers are optional (`benchmarks/linear_peers.py`): one that is not installed, or does not run here, is listed with its
  reason.
- `MM_KERNELS_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2` caps mm and torch,
  and what a machine without AVX512 would show can be measured on one with it.

`tests/kernels/test_kernels.py` and `benchmarks/quantized_generate.py` judge accuracy. `--render FILE ...` prints the
table of earlier runs' JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import timeit
import warnings
from pathlib import Path
from typing import Any

import torch
from linear_peers import PEERS, Maker, Step
from torch import nn

import mm.kernels as kernels
from mm.kernels import cpu

FLUX = ((3072, 3072), (12288, 3072), (3072, 12288))  # (outputs, inputs)
TRUNK = ((256, 256), (1024, 256), (256, 1024), (1536, 256))
RANK = 32
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ours(linear: nn.Linear, *, rank: int = RANK, fused: bool = True) -> Step:
    """The 4-bit layer of mm with a branch: in its op, beside it, or (rank 0) without."""
    outputs, inputs = linear.weight.shape
    packed, scales = kernels.quantize_weight(linear.weight)
    down = torch.randn(rank, inputs).bfloat16() * inputs**-0.5
    up = torch.randn(outputs, rank).bfloat16()
    if rank and fused:
        return lambda x: kernels.branched_linear(x, packed, scales, None, None, down, up, None)
    if not rank:
        return lambda x: kernels.branched_linear(x, packed, scales)
    down, up = down.to(linear.weight.dtype), up.to(linear.weight.dtype)
    return lambda x: kernels.branched_linear(x, packed, scales).addmm_(x @ down.T, up.T)


def plain(linear: nn.Linear) -> Step:
    """torch as it is, without a branch."""
    return lambda x: nn.functional.linear(x, linear.weight)


def int4pack(linear: nn.Linear) -> Step:
    """torch's own 4-bit weights, groups of 64, inputs and scales in the layer's type."""
    outputs, inputs = linear.weight.shape
    values = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    scales = torch.randn(inputs // 64, outputs, 2).to(linear.weight.dtype)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scales)


def methods(dtype: str) -> dict[str, Maker]:
    """torch's own layers and mm's; the first is the baseline."""
    return {f"torch {dtype}": plain, **OWN}


OWN: dict[str, Maker] = {
    "mm, fused branch": ours,
    "mm, no branch": lambda linear: ours(linear, rank=0),
    "mm, unfused branch": lambda linear: ours(linear, fused=False),
    "torch int4pack": int4pack,
}


def native_type() -> str:
    """bf16 where it takes torch at most fp32's time, measured; fp32 elsewhere."""
    best = {}
    for name, dtype in TYPES.items():
        x, weight = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        best[name] = min(timeit.repeat(lambda x=x, w=weight: nn.functional.linear(x, w), number=1, repeat=7))
    return "bf16" if best["bf16"] <= best["fp32"] else "fp32"


def layer(outputs: int, inputs: int, dtype: torch.dtype) -> nn.Linear:
    """A random layer."""
    made = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    nn.init.normal_(made.weight, std=inputs**-0.5)
    return made.to(dtype)


def prepare(
    shape: tuple[int, int], dtype: torch.dtype, copies: int, makers: dict[str, Maker], absent: dict[str, str]
) -> dict[str, list[Step]]:
    """Every method's layers; those that fail move to `absent` with their reason."""
    steps: dict[str, list[Step]] = {}
    probe = torch.randn(2, shape[1]).to(dtype)
    for name, make in makers.items():
        if name in absent:
            continue
        try:
            torch.manual_seed(0)
            steps[name] = [make(layer(*shape, dtype)) for _ in range(copies)]
            steps[name][0](probe)
        except Exception as error:  # a peer may fail in any way; the others are still worth timing
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
            steps.pop(name, None)
    return steps


def seconds(steps: dict[str, list[Step]], x: torch.Tensor, rounds: int, least: float) -> dict[str, float]:
    """Median seconds a call of every method, timed in turn; a round of a method takes `least` seconds or one call."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for number in range(rounds + 1):  # the first is a warm-up
        for name, layers in order.sample(list(steps.items()), len(steps)):
            calls, start = 0, time.perf_counter()
            while calls < len(layers) or time.perf_counter() - start < least:
                layers[calls % len(layers)](x)
                calls += 1
                if calls >= len(layers) and time.perf_counter() - start > least:
                    break
            if number:
                found[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(times) for name, times in found.items()}


def measure(
    shape: tuple[int, int], tokens: int, dtype: str, peers: dict[str, Maker], absent: dict[str, str], rounds: int
) -> dict:
    """One row of the table."""
    (outputs, inputs), own = shape, methods(dtype)
    x = torch.randn(tokens, inputs).to(TYPES[dtype])
    # With one token: enough copies that no cache holds a part of them worth the name, even of the narrowest.
    copies = max(1, min(24, (96 << 20) // (outputs * inputs // 2))) if tokens == 1 else 1
    rounds = 3 * rounds if tokens == 1 else rounds  # reading memory, which varies from round to round by a tenth
    with torch.no_grad():
        least = 0.05 if tokens < 256 else 0.0
        alone = seconds(prepare(shape, x.dtype, copies, own, absent), x, rounds, least)
        times = seconds(prepare(shape, x.dtype, copies, own | peers, absent), x, rounds, least) if peers else alone
    base = times[f"torch {dtype}"]
    return {
        "outputs": outputs,
        "inputs": inputs,
        "tokens": tokens,
        "milliseconds": {name: 1e3 * t for name, t in times.items()},
        "speedup": {name: base / t for name, t in times.items()},
        "gops": {name: 2e-9 * tokens * outputs * inputs / t for name, t in times.items()},
        "fused_adds": _added(alone, "mm, fused branch"),
        "unfused_adds": _added(alone, "mm, unfused branch"),
        "fused_adds_among_peers": _added(times, "mm, fused branch"),
    }


def _added(times: dict[str, float], name: str) -> float | None:
    """What a branch adds to the time of mm's layer without one."""
    return times[name] / times["mm, no branch"] - 1 if {name, "mm, no branch"} <= set(times) else None


def table(report: dict, columns: list[str] | None = None) -> str:
    """Markdown: times as fast as torch in the same run; the last columns say what the branch adds."""
    rows, base = report["rows"], f"torch {report['settings']['dtype']}"
    names = columns or [name for name in rows[0]["speedup"] if name != base]
    names = [name for name in names if any(name in row["speedup"] for row in rows)]
    head = ["outputs x inputs", "tokens", f"{base}, ms", *names, "branch adds", "unfused adds"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        cells = [f"{row['outputs']} x {row['inputs']}", str(row["tokens"]), f"{row['milliseconds'][base]:.3g}"]
        cells += [f"{row['speedup'][n]:.2f}" if n in row["speedup"] else "" for n in names]
        cells += [f"{100 * row[key]:.0f} %" for key in ("fused_adds", "unfused_adds")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines + [f"\nNot here: {name} ({why})." for name, why in report["absent"].items()])


def shapes_of(name: str) -> tuple[tuple[int, int], ...]:
    """flux, trunk, or one shape as OUTPUTSxINPUTS."""
    if name in ("flux", "trunk"):
        return FLUX if name == "flux" else TRUNK
    outputs, inputs = map(int, name.split("x"))
    return ((outputs, inputs),)


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="print the table of an earlier run and measure nothing"
    )
    parser.add_argument("--columns", nargs="+", help="methods that the table shows; all by default")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--shapes", nargs="+", default=["flux", "trunk"], help="flux, trunk, or OUTPUTSxINPUTS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["auto", *TYPES], default="auto", help="of inputs and of torch's weights")
    parser.add_argument(
        "--peers", nargs="*", help="only these of the other libraries, by the first letters of their names"
    )
    parser.add_argument("--no-peers", action="store_true", help="only torch and mm")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Times everything and prints the table."""
    options = options_of()
    if options.render:
        reports = [json.loads(path.read_text()) for path in options.render]
        rows, absent = [row for report in reports for row in report["rows"]], reports[0]["absent"]
        print(table({"rows": rows, "absent": absent, "settings": reports[0]["settings"]}, options.columns))
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    wanted = tuple(options.peers or [""])
    peers = {} if options.no_peers else {name: make for name, make in PEERS.items() if name.startswith(wanted)}
    dtype = native_type() if options.dtype == "auto" else options.dtype
    settings = {
        "threads": options.threads, "rank": RANK, "rounds": options.rounds, "dtype": dtype,
        "backends": kernels.backends(), "path": cpu.instruction_set(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    report: dict[str, Any] = {"rows": [], "absent": {}, "settings": settings}
    for shape in [shape for name in options.shapes for shape in shapes_of(name)]:
        for tokens in options.tokens:
            row = measure(shape, tokens, dtype, peers, report["absent"], options.rounds)
            report["rows"].append(row)
            print(table({**report, "rows": [row], "absent": {}}, options.columns).splitlines()[-1], flush=True)
    print(f"\n{table(report, options.columns)}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
