"""Less work a picture on mm-tiny: compose score, PSNR to the full picture, tries, work and seconds of each setting.

    python benchmarks/fast.py --mode flow --pictures 2 --json fast-flow.json     # quality on all tuning prompts
    python benchmarks/fast.py --mode flow --time --json fast-flow-time.json      # seconds, alternated in one run

Design choices
- Every setting draws the same prompts and seeds as the full one, so that verdicts are paired; the interval is that of
  the change (`mm.core.statistics.paired_change`, prompts resampled).
- Prompts are the tuning ones. The judge reads; the model's own counter is not asked.
- Work is counted in rows that pass the trunk, the velocity decoder or the code head, beside seconds: rows do not depend
  on what else runs on the machine.
- Timing alternates the settings picture by picture and compares means, since a picture that is drawn again takes longer
  than others: seconds, and the processor's seconds, which count no other process. Checks and tries are part of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mm import TextToImagePipeline
from mm.core.files import write_json
from mm.core.nouns import counted as counted_nouns
from mm.core.statistics import paired_change
from mm.evaluation.compose import limited, picture_seed
from mm.evaluation.prompts import COMPOSE_TUNE, Prompt, load_prompts
from mm.pipelines.fast import CAREFUL_CODES, FULL_CODES
from mm.world.judge import Judge
from mm.world.tasks import satisfies

Call = dict[str, Any]
FULL: Call = asdict(FULL_CODES)
CAREFUL: Call = asdict(CAREFUL_CODES)
ONCE: Call = {"tries": 1}
PLAIN: Call = {"steps": 12, "spaced": False, "guided": 1.0, "features": 1.0}
SETTINGS: dict[str, dict[str, Call]] = {
    "flow": {
        "full": {},
        "fewer steps (8)": {"num_inference_steps": 8},
        "fewer steps (6)": {"num_inference_steps": 6},
        "8 steps, spaced": {"fast": PLAIN | {"steps": 8, "spaced": True}},
        "guidance in 6 of 12 steps": {"fast": PLAIN | {"guided": 0.5}},
        "Adaptive Guidance, cosine .995": {"fast": PLAIN | {"threshold": 0.995}},
        "LinearAG": {"fast": PLAIN | {"threshold": 0.995, "linear": True}},
        "features in 8 of 12 steps": {"fast": PLAIN | {"features": 0.66}},
        "fast": {"fast": True},
    },
    "codes": {
        "full": {},
        "unchecked": {"fast": CAREFUL},
        "once": {"fast": ONCE},
        "once, random order": {"fast": ONCE | {"spread": False}},
        "once, 12 steps": {"fast": ONCE | {"steps": 12}},
        "once, 16 steps, guidance in all": {"fast": ONCE | {"steps": 16, "guided_from": 0.0, "guided_until": 1.0}},
        "two tries": {"fast": {"tries": 2}},
        "fast": {"fast": True},
    },
}  # fmt: skip


@contextmanager
def counted(pipe: TextToImagePipeline) -> Iterator[dict[str, float]]:
    """Adds up the rows that pass each part; of a local step the share of the tokens."""
    rows = {"trunk": 0.0, "velocity decoder": 0.0, "code head": 0.0}
    tokens = int(pipe.trunk.config.latent_size) ** 2

    def wrap(part: Any, method: str, name: str, size: Callable[..., float]) -> None:
        inner = getattr(part, method)

        def run(*args: Any, **kwargs: Any) -> Any:
            rows[name] += 0 if "_entry_point" in kwargs else size(*args)  # counted under its own name
            return inner(*args, **kwargs)

        setattr(part, method, run)

    places: list[tuple[Any, str, str, Callable[..., float]]] = [
        (pipe.trunk, "forward", "trunk", lambda x, *_: len(x)),
        (pipe.trunk, "full_step", "trunk", lambda x, *_: len(x)),
        (pipe.trunk, "local_step", "trunk", lambda x, _m, _c, at: at.numel() / tokens),
        (pipe.velocity_decoder, "forward", "velocity decoder", lambda x, *_: len(x)),
        (pipe.code_head, "sample", "code head", lambda x, *_: len(x)),
        (pipe.code_head, "sample_with_likelihood", "code head", lambda x, *_: len(x)),
    ]
    for place in places:
        wrap(*place)
    try:
        yield rows
    finally:
        for part, method, *_ in places:
            delattr(part, method)


def draw(
    pipe: TextToImagePipeline, jobs: list[tuple[Prompt, int]], mode: str, call: Call, size: int
) -> tuple[torch.Tensor, list[int]]:
    """uint8 pictures (B, 3, 128, 128), and how often each was drawn."""
    parts: list[torch.Tensor] = []
    tries: list[int] = []
    for start in range(0, len(jobs), size):
        now = jobs[start : start + size]
        output = pipe(
            [prompt.text for prompt, _ in now],
            generator=[torch.Generator().manual_seed(seed) for _, seed in now],
            mode=mode, output_type="pt", **call,
        )  # fmt: skip
        parts.append((output.images * 255).round().to(torch.uint8))
        tries += getattr(output, "tries", [1] * len(now))
    return torch.cat(parts), tries


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """The median over pictures, in dB; equal pictures count as 60."""
    error = (a.float() - b.float()).square().flatten(1).mean(1).clamp_min(255**2 / 1e6)
    return float((10 * torch.log10(255**2 / error)).median())


def quality(pipe: TextToImagePipeline, mode: str, names: list[str], each: int, limit: int | None, size: int) -> dict:
    """For each setting: score, change with its interval, PSNR to full, rows a picture, and what was drawn again."""
    prompts, judge = limited(load_prompts(COMPOSE_TUNE), limit), Judge.from_pretrained()
    jobs = [(prompt, picture_seed(0, prompt.id, k)) for prompt in prompts for k in range(each)]
    clusters = [number for number, _ in enumerate(prompts) for _ in range(each)]
    report: dict[str, Any] = {}
    full, before = torch.empty(0), [False]
    for name in names:
        with counted(pipe) as rows:
            pictures, tries = draw(pipe, jobs, mode, SETTINGS[mode][name], size)
        right = [satisfies(r, p.wanted).ok for r, (p, _) in zip(judge.read(pictures), jobs, strict=True)]
        if name == "full":
            full, before = pictures, right
        change, low, high = paired_change(before, right, clusters)
        report[name] = {
            "score": sum(right) / len(right), "n": len(right), "change": change, "low": low, "high": high,
            "psnr": psnr(pictures, full), "rows": {part: count / len(jobs) for part, count in rows.items()},
            "tries": statistics.mean(tries), "again": sum(count > 1 for count in tries) / len(tries),
            "tasks": _by_task(jobs, right),
        }  # fmt: skip
        print(_row(name, report[name]), flush=True)
    return report


def seconds(pipe: TextToImagePipeline, mode: str, names: list[str], rounds: int, count: int) -> dict:
    """Mean seconds of a call for `count` pictures, the settings alternated over tuning prompts; and their scores."""
    prompts = load_prompts(COMPOSE_TUNE)[:: max(1, 120 // rounds)][:rounds]
    judge = Judge.from_pretrained()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    drawn: dict[str, list[int]] = {name: [] for name in names}
    right: dict[str, list[bool]] = {name: [] for name in names}
    for name in names:
        draw(pipe, [(prompts[0], 1)] * count, mode, SETTINGS[mode][name], count)  # warm
    for done, prompt in enumerate(prompts, 1):
        jobs = [(prompt, picture_seed(0, prompt.id, k)) for k in range(count)]
        for name in names:
            start = time.perf_counter(), time.process_time()
            pictures, tries = draw(pipe, jobs, mode, SETTINGS[mode][name], count)
            found[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            drawn[name] += tries
            right[name] += [satisfies(read, prompt.wanted).ok for read in judge.read(pictures)]
        if done % 20 == 0 or done == len(prompts):
            print(f"after {counted_nouns(done, 'prompt')}:")
            report = _timed(found, drawn, right, count)
    return report


def _timed(
    found: dict[str, list[tuple[float, float]]], drawn: dict[str, list[int]], right: dict[str, list[bool]], count: int
) -> dict[str, Any]:  # fmt: skip
    """Seconds, tries and scores of each setting, the first of which is the full one; printed as rows of a table."""
    report: dict[str, Any] = {}
    for name, times in found.items():
        wall, cpu = (statistics.mean(some) for some in zip(*times, strict=True))
        first = report.get("full", {"seconds": wall, "cpu_seconds": cpu})
        ratio = {"times_as_fast": first["seconds"] / wall, "times_less_cpu": first["cpu_seconds"] / cpu}
        change, low, high = paired_change(right["full"], right[name], [k // count for k in range(len(right[name]))])
        report[name] = {
            "seconds": wall, "cpu_seconds": cpu, **ratio,
            "tries": statistics.mean(drawn[name]), "again": statistics.mean(one > 1 for one in drawn[name]),
            "score": statistics.mean(right[name]), "n": len(right[name]), "change": change, "low": low, "high": high,
        }  # fmt: skip
        figures = " | ".join(f"{report[name][key]:.3f}" for key in list(report[name])[:7])
        interval = " ".join(f"{100 * one:+.1f}" for one in (change, low, high))
        print(f"| {name} | {count} | {figures} | {interval} |", flush=True)
    return report


def _by_task(jobs: list[tuple[Prompt, int]], right: list[bool]) -> dict[str, float]:
    """The share of right pictures of each task."""
    tasks = [prompt.wanted.task for prompt, _ in jobs]
    return {
        task: statistics.mean(one for one, mine in zip(right, tasks, strict=True) if mine == task)
        for task in dict.fromkeys(tasks)
    }


def _row(name: str, one: dict) -> str:
    rows = " / ".join(f"{count:.1f}" for count in one["rows"].values())
    change = f"{100 * one['change']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
    again = f"{one['tries']:.2f} | {one['again']:.3f}"
    return f"| {name} | {one['score']:.3f} | {change} | {one['psnr']:.1f} | {rows} | {again} |"


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=list(SETTINGS), default="flow")
    parser.add_argument("--only", nargs="+", help="names of settings beside full")
    parser.add_argument("--pictures", type=int, default=2, help="of each prompt")
    parser.add_argument("--limit", type=int, help="prompts a task")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--time", action="store_true", help="seconds instead of quality")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--count", type=int, default=1, help="pictures of a timed call")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    given = parser.parse_args(arguments)
    names = ["full", *(given.only or [name for name in SETTINGS[given.mode] if name != "full"])]
    if unknown := [name for name in names if name not in SETTINGS[given.mode]]:
        parser.error(f"no setting {unknown[0]!r}; known: {', '.join(SETTINGS[given.mode])}")
    pipe = TextToImagePipeline.from_pretrained("mm-tiny")
    pipe.set_progress_bar_config(disable=True)
    if given.time:
        report = seconds(pipe, given.mode, names, given.rounds, given.count)
    else:
        report = quality(pipe, given.mode, names, given.pictures, given.limit, given.batch_size)
    if given.json:
        facts = {"mode": given.mode, "threads": torch.get_num_threads(), "count": given.count}
        write_json(given.json, {"rows": report, "settings": facts})


if __name__ == "__main__":
    main()
