"""How long a picture takes, part by part, with the prompt's cache and without it, warm and cold.

    python benchmarks/generate.py [--model mm-tiny | --random] [--json FILE]

Design choices
- Medians of several runs after a warm-up, all in one process; only the cold command starts a new one.
- Shares come from timing each component's calls inside the same runs, so they add up with "other" to the whole.
- The peer is the same weights with the prompt read again at every step, which is what a model does whose text sees the
  timestep: same pictures, no cache.
- `--random` measures fresh weights of the published size: time does not depend on what a model has learned.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mm import TextToImagePipeline
from mm.core.files import write_json
from mm.models.cache import PromptCache
from mm.models.trunk import Trunk

PROMPT = "two red cats on grass, watercolor style"


def median_seconds(run: Callable[[], object], runs: int) -> float:
    """Median of `runs` after one warm-up."""
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def timed(pipe: TextToImagePipeline) -> Iterator[dict[str, float]]:
    """Adds up the seconds spent in each part's calls."""
    spent = {"encode text": 0.0, "trunk": 0.0, "velocity decoder": 0.0, "decode": 0.0}
    places = [
        (pipe.trunk, "encode_text", "encode text"),
        (pipe.trunk, "forward", "trunk"),
        (pipe.velocity_decoder, "forward", "velocity decoder"),
        (pipe.autoencoder, "decode", "decode"),
    ]

    def wrap(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = call(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return out

        return run

    for part, method, name in places:
        setattr(part, method, wrap(getattr(part, method), name))
    try:
        yield spent
    finally:
        for part, method, _ in places:
            delattr(part, method)


@contextmanager
def without_cache(pipe: TextToImagePipeline) -> Iterator[None]:
    """Reads the prompts anew at every step."""
    trunk, texts = pipe.trunk, []
    encode, forward = trunk.encode_text, trunk.forward

    def remember(ids: torch.Tensor, mask: torch.Tensor | None = None) -> PromptCache:
        texts.append((ids, mask))
        return encode(ids, mask)

    def again(latents: torch.Tensor, sigma: torch.Tensor, prompt: PromptCache, *rest: Any) -> Any:
        caches = [encode(ids, mask) for ids, mask in texts[-2:]]
        each = len(latents) // len(caches)
        fresh = PromptCache.cat([c.repeat(each // len(c)) for c in caches])
        return Trunk.forward(trunk, latents, sigma, fresh, *rest)

    trunk.encode_text, trunk.forward = remember, again
    try:
        yield
    finally:
        trunk.encode_text, trunk.forward = encode, forward
        del trunk.encode_text, trunk.forward


def cold_seconds(model: str, runs: int) -> float:
    """`mm generate` from a fresh process, imports and loading counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mm", "generate", PROMPT, "--seed", "7", "--model", model, "-o", folder]
        return median_seconds(lambda: subprocess.run(command, check=True, capture_output=True), runs)


def save_random(folder: str) -> None:
    """A pipeline of the default sizes, which are mm-tiny's, with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from mm.models.codes import CodeHead
    from mm.models.text import build_text_tokenizer
    from mm.models.velocity import VelocityDecoder
    from mm.tokenizers import Autoencoder, Bridge

    torch.manual_seed(0)
    pipe = TextToImagePipeline(
        text_tokenizer=build_text_tokenizer(),
        trunk=Trunk(),
        velocity_decoder=VelocityDecoder(),
        autoencoder=Autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        code_head=CodeHead(),
        bridge=Bridge(),
    )
    for parameter in pipe.trunk.parameters():
        if not parameter.any():  # a fresh trunk starts blind to its prompt, and cache or no cache would be the same
            torch.nn.init.normal_(parameter, std=0.05)
    pipe.save_pretrained(folder)


def measure(model: str, runs: int) -> dict[str, Any]:
    """All figures, in seconds and shares."""
    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)

    def draw(count: int, mode: str = "flow") -> Any:
        generator = torch.Generator().manual_seed(7)
        return pipe(PROMPT, num_images_per_prompt=count, generator=generator, mode=mode, output_type="pt").images

    report: dict[str, Any] = {"threads": torch.get_num_threads()}
    for count in (1, 4):
        report[f"flow, {count} at once"] = median_seconds(lambda n=count: draw(n), runs)
        picture = draw(count)
        with without_cache(pipe):
            report[f"flow, {count} at once, no cache"] = median_seconds(lambda n=count: draw(n), runs)
            report[f"largest difference, {count}"] = float((draw(count) - picture).abs().max())
        if pipe.code_head is not None:
            report[f"codes, {count} at once"] = median_seconds(lambda n=count: draw(n, "codes"), runs)
    with timed(pipe) as spent:
        start = time.perf_counter()
        for _ in range(runs):
            draw(1)
        whole = time.perf_counter() - start
    shares = {name: seconds / whole for name, seconds in spent.items()}
    report["shares"] = shares | {"other": 1 - sum(shares.values())}
    report["cold command"] = cold_seconds(model, max(1, runs // 2))
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="mm-tiny", help="an embedded model, a folder, or a hub name")
    which.add_argument("--random", action="store_true", help="random weights of the published size instead")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.random:
        with tempfile.TemporaryDirectory() as folder:
            save_random(folder)
            report = measure(folder, args.runs)
    else:
        report = measure(args.model, args.runs)
    for name, value in report.items():
        if isinstance(value, dict):
            print(f"{name:32s}" + ", ".join(f"{k} {x:.1%}" for k, x in value.items()))
        else:
            print(f"{name:32s}{value:.4g}")
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
