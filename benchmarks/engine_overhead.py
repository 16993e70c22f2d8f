"""Time of `Engine.draw` beside the plain call of its pipeline, in turns in one run, and the memory of its weights.

    python benchmarks/engine_overhead.py --model mm-tiny --json runs/engine.json

The ratio is that of the medians; the interval resamples the pairs. "weights" counts the bytes of all tensors that the
engine's pipelines hold, each once, beside those of the plain pipeline: 1.0 means that there is no copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import mm
from mm.core.files import write_json


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mm-tiny", help="an embedded model, a folder, or a hub name")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    parser.add_argument("--pairs", type=int, default=10, help="pictures of each kind")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    report = measure(mm.load(given.model), given.steps, given.size, given.pairs) | {"model": given.model}
    longer = f"the engine takes {report['ratio']:.4f} times as long ({1000 * report['added']:+.1f} ms)"
    print(f"{given.model}: a picture takes {report['plain']:.3f} s; {longer}, weights {report['weights']:.3f}")
    if given.json is not None:
        write_json(given.json, report)


def measure(engine: Any, steps: int | None, side: int | None, pairs: int) -> dict[str, Any]:
    """Seconds of both calls, taken in turns, after one of each to warm up."""
    import torch

    pipe, can = engine.pipeline, engine.capabilities
    size = (side, side) if side is not None else can.size
    asked: dict[str, Any] = {"num_inference_steps": steps or can.steps[""], "width": size[0], "height": size[1]}
    if can.guidance_name:
        asked[can.guidance_name] = can.guidance
    pipe.set_progress_bar_config(disable=True)

    def plain(seed: int) -> Any:
        return pipe(prompt="two red cats", generator=torch.Generator().manual_seed(seed), **asked).images[0]

    def ours(seed: int) -> Any:
        return engine.draw("two red cats", seed=seed, steps=asked["num_inference_steps"], size=size)[0]

    assert plain(0).tobytes() == ours(0).tobytes(), "the two draw other pictures"
    times: dict[str, list[float]] = {"plain": [], "engine": []}
    for pair in range(pairs):
        order = (("plain", plain), ("engine", ours)) if pair % 2 else (("engine", ours), ("plain", plain))
        for name, call in order:
            start = time.perf_counter()
            call(pair)
            times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    added = statistics.median(b - a for a, b in zip(times["plain"], times["engine"], strict=True))
    return {
        "plain": middle["plain"], "engine": middle["engine"], "ratio": middle["engine"] / middle["plain"],
        "added": added, "weights": weights(engine) / weights(engine, plain=True), "pairs": pairs, "steps": asked,
    }  # fmt: skip


def weights(engine: Any, *, plain: bool = False) -> int:
    """Bytes of the tensors of all pipelines of an engine, or of its plain pipeline, each tensor once."""
    pipes = [engine.pipeline] if plain else [engine.pipeline_for(task) for task in engine.capabilities.tasks[:1]]
    modules = [part for pipe in pipes for part in pipe.components.values() if hasattr(part, "parameters")]
    held = {
        t.data_ptr(): t.numel() * t.element_size() for part in modules for t in (*part.parameters(), *part.buffers())
    }
    return sum(held.values())


if __name__ == "__main__":
    main()
