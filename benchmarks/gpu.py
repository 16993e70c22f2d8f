"""All that is measured of mm on a new NVIDIA GPU, in at most eight minutes: `python benchmarks/gpu.py --json gpu.json`.

1. Every op of the Triton backend against `reference`, on ragged random shapes in three types.
2. The table of docs/kernels-gpu.md: `linear_gpu.py` at FLUX shapes, against torch bf16, torch fp8, int4 and NF4.
3. A transformer of FLUX.1's size with random weights: bytes and seconds at 16 bits, then at 4 bits; four steps of
   FluxPipeline at 1024 x 1024 on the 4-bit one.

Design choices
- A block of each kind is quantized, without data, and timed. The other blocks of its kind are copies: they cost the
  same memory and time. `--whole` quantizes each block.
- Sections stop at their share of `--seconds`; what was left out is listed. The JSON is written after each section.
- A failed check is reported with its numbers and makes the exit code 1; the timings still run.

`--device cpu --small` walks the same path without a GPU, for a test of this script.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import linear_gpu
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from linear import shapes_of

import mm
import mm.kernels as kernels
from mm.core.files import write_json

SHAPES = (
    (1, 64, 64),
    (3, 130, 200),
    (17, 96, 320),
    (64, 257, 1000),
    (65, 512, 576),
    (333, 130, 1088),
    (1024, 384, 512),
)
ROUNDINGS = ((8, 0, False, 0.0), (8, 64, False, 0.0), (4, 64, False, 0.0), (4, 64, True, 0.171875))
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # docs/kernels-gpu.md
TOKENS = (1, 16, 256, 1024, 4096)
FULL = {"blocks": (19, 38), "heads": 24, "words": 512, "side": 1024}
SMALL = {"blocks": (2, 3), "heads": 2, "words": 8, "side": 64}


class Clock:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def cases(device: str, backend: str, clock: Clock) -> Iterator[dict[str, Any]]:
    """Rows of the check: an op, its shape, and how many times its bound it is off."""
    for seed, (tokens, outputs, inputs) in enumerate(SHAPES):
        for dtype in BOUNDS:
            for rounding in ROUNDINGS:
                if clock.left() < 0:
                    yield {"op": "left out", "from": [tokens, outputs, inputs], "off": 0.0}
                    return
                yield from _case(tokens, outputs, inputs, dtype, rounding, seed, device, backend)


def _case(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, rounding: Any, seed: int, device: str, backend: str
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    x, smooth = normal(tokens, inputs).to(dtype), (normal(inputs).abs() + 0.5).to(dtype)
    down, up = normal(32, inputs, scale=inputs**-0.5).to(dtype), normal(outputs, 32, scale=0.2).to(dtype)
    weight, scales = kernels.quantize_weight(normal(outputs, inputs, scale=inputs**-0.5))
    bias, branch = normal(outputs).to(dtype), normal(32)
    with kernels.use_backend("reference"):
        want = kernels.quantize_activations(x, smooth, down, *rounding)
        out = kernels.lowbit_linear(*want[:2], weight, scales, bias, want[2], up, branch, dtype)
    with kernels.use_backend(backend):
        got = kernels.quantize_activations(x, smooth, down, *rounding)
        made = kernels.lowbit_linear(*want[:2], weight, scales, bias, want[2], up, branch, dtype)
        whole = kernels.branched_linear(x, weight, scales, bias, smooth, down, up, branch, *rounding)
    head = {"shape": [tokens, outputs, inputs], "type": str(dtype).removeprefix("torch."), "rounding": list(rounding)}
    moved = float((got[0] != want[0]).float().mean())
    yield head | {"op": "quantize_activations", "off": 0.0 if moved <= 1e-3 else moved, "values moved": moved}
    # products of many tokens are rounded a second time: half an int8 step of each weight, see the page
    folded = backend == "triton" and rounding[1] == 0 and tokens >= _fold_from()
    second = 0.01 * float(out.float().abs().max()) if folded else 0.0
    for op, result, slack in (("lowbit_linear", made, second), ("branched_linear", whole, second)):
        limit = BOUNDS[dtype] * (out.double().abs() + 4) + slack
        if op == "branched_linear":  # a moved value changes a product by a step
            limit = limit + (0 if moved == 0 else 0.02 * float(out.float().abs().max()))
        yield head | {"op": op, "off": float(((result.double() - out.double()).abs() / limit).max())}


def _fold_from() -> int:
    from mm.kernels.triton import plans

    return plans.FOLD_FROM


def check(device: str, backend: str, clock: Clock) -> dict[str, Any]:
    """The worst row of each op, and every row that is off by more than its bound."""
    rows = list(cases(device, backend, clock))
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["op"]] = max(worst.get(row["op"], 0.0), row["off"])
    failed = [row for row in rows if not row["off"] <= 1]
    print(
        f"checked {len(rows)} results on {backend}; times the bound, at most: {worst}; failed: {len(failed)}",
        flush=True,
    )
    return {"backend": backend, "rows": len(rows), "worst": worst, "failed": failed}


def times(shapes: str, tokens: tuple[int, ...], rounds: int, device: str, clock: Clock) -> dict[str, Any]:
    """Rows of the table, in an order that leaves the most telling ones for last cut."""
    methods, absent = linear_gpu.there(device)
    for name, why in absent.items():
        print(f"{name} is not here: {why}", flush=True)
    rows, left_out = [], []
    for count in sorted(tokens, key=lambda one: one not in (1, 16, 4096)):
        for shape in shapes_of(shapes):
            if clock.left() < 0:
                left_out.append([*shape, count])
                continue
            rows.append(linear_gpu.measure(shape, count, rounds, device, methods))
            print(linear_gpu.table(rows[-1:]).splitlines()[-1], flush=True)
    rows.sort(key=lambda row: (row["outputs"], row["inputs"], row["tokens"]))
    print(linear_gpu.table(rows) if rows else "no row was measured", flush=True)
    return {"rows": rows, "absent": absent, "left_out": left_out}


def flux(size: dict[str, Any], double: int, single: int, device: str) -> Any:
    """FLUX.1's transformer with so many blocks, random bf16 weights."""
    axes = (16, 56, 56)
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=size["heads"], guidance_embeds=True
        )
    model = model.to(torch.bfloat16).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=list(axes))  # no parameter, and meta's is gone
    return model.requires_grad_(False).eval()


def small_flux(size: dict[str, Any], device: str, *, whole: bool) -> tuple[Any, dict[str, float]]:
    """The transformer at 4 bits, block by block, and the seconds that quantizing a block of each kind took."""
    counts, seconds, blocks = size["blocks"], {"double": 0.0, "single": 0.0}, {"double": [], "single": []}
    rest: Any = None
    for kind, number in zip(("double", "single"), counts, strict=True):
        for _ in range(number if whole else 1):
            model = flux(size, int(kind == "double"), int(kind == "single"), device)
            start = time.perf_counter()
            mm.quantize(model, mm.SVDQuantConfig(rank=32, data_free=True))
            seconds[kind] += time.perf_counter() - start
            blocks[kind].append((model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0])
            rest = model
        if not whole:
            blocks[kind] += [copy.deepcopy(blocks[kind][0]) for _ in range(number - 1)]
    rest.transformer_blocks = torch.nn.ModuleList(blocks["double"])
    rest.single_transformer_blocks = torch.nn.ModuleList(blocks["single"])
    rest.register_to_config(num_layers=counts[0], num_single_layers=counts[1])
    return rest, seconds


def gigabytes(model: torch.nn.Module) -> float:
    """Bytes of parameters and buffers, in 1e9."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e9


def measured_draw(model: Any, size: dict[str, Any], device: str, steps: int) -> dict[str, float]:
    """Seconds and peak memory of a picture without text encoders and autoencoder, after a warm-up step."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=model,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    given = {
        "prompt_embeds": torch.randn(1, size["words"], 4096, device=device, dtype=torch.bfloat16),
        "pooled_prompt_embeds": torch.randn(1, 768, device=device, dtype=torch.bfloat16),
        "height": size["side"], "width": size["side"], "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip

    def drawn(count: int) -> float:
        start = time.perf_counter()
        out = pipe(num_inference_steps=count, **given).images
        if device == "cuda":
            torch.cuda.synchronize()
        if not torch.isfinite(out.float()).all():
            raise RuntimeError("the latents are not finite")
        return time.perf_counter() - start

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    drawn(1)
    made = {"steps": steps, "seconds": drawn(steps)}
    if device == "cuda":
        made["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return made


def transformer(size: dict[str, Any], device: str, *, whole: bool) -> dict[str, Any]:
    """Section 3."""
    report: dict[str, Any] = {"size": size}
    plain = flux(size, *size["blocks"], device)
    parameters = sum(p.numel() for p in plain.parameters())
    report |= {"parameters": parameters, "bf16": {"gb": gigabytes(plain)} | measured_draw(plain, size, device, 4)}
    del plain
    if device == "cuda":
        torch.cuda.empty_cache()
    model, seconds = small_flux(size, device, whole=whole)
    report["quantizing_seconds"] = seconds | {"blocks": list(size["blocks"]) if whole else [1, 1]}
    report["4 bits"] = {"gb": gigabytes(model)} | measured_draw(model, size, device, 4)
    for name in ("bf16", "4 bits"):
        print(f"{parameters / 1e9:.2f}B parameters, {name}: {report[name]}", flush=True)
    print(f"seconds of quantizing: {report['quantizing_seconds']}", flush=True)
    return report


def main(arguments: list[str] | None = None) -> int:
    """Measures everything; 1 where a check failed or a section raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write all figures here, after each section")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", default=None, help="of the check (default: triton; with --device cpu cpu)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a test of this script")
    parser.add_argument("--whole", action="store_true", help="quantize every block, not one of each kind")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--sections", nargs="+", choices=["check", "times", "flux"], default=["check", "times", "flux"])
    given = parser.parse_args(arguments)
    backend = given.backend or ("triton" if given.device == "cuda" else "cpu")
    if (state := kernels.backends().get(backend)) != "ready":
        raise SystemExit(f"the {backend} backend is not here: {state}")
    small = given.small
    parts: dict[str, Callable[[], Any]] = {
        "check": lambda: check(given.device, backend, Clock(given.seconds / 4)),
        "times": lambda: times(
            "256x256" if small else "flux", (1, 16) if small else TOKENS, 2 if small else 15, given.device,
            Clock(given.seconds * 0.4),
        ),
        "flux": lambda: transformer(SMALL if small else FULL, given.device, whole=given.whole),
    }  # fmt: skip
    report: dict[str, Any] = {"settings": linear_gpu.settings(given.device, 15)}
    wrong = False
    for name in given.sections:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                report[name] = parts[name]()
        except Exception as error:  # the other sections still run
            report[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:600]}
            print(f"{name} failed: {report[name]['error']}", file=sys.stderr, flush=True)
        report[name]["section_seconds"] = time.perf_counter() - start
        wrong |= bool(report[name].get("failed") or report[name].get("error"))
        if given.json:
            write_json(given.json, report)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
