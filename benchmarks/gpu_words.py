"""Our model's scores that words decide, cell by cell: `python benchmarks/gpu_words.py --seconds 120 --json words.json`.

Cells: the 200 prompts in other words beside the same in plain ones, in flow and in codes mode, drawn once and with
`best_of` 8; and README's example, "three blue stars at night", from 8 seeds, with the seconds of a picture.

Design choices
- The JSON is written after each cell. No cell begins when the time is over, and what was left out is listed.
- The device is chosen as everywhere in mm: a GPU where there is one. `--limit 1 --pictures 1` walks the path on a CPU.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import mm
from mm.core.files import write_json
from mm.evaluation.compose import ComposeConfig
from mm.evaluation.wording import evaluate_wording
from mm.world.judge import Judge

EXAMPLE, SEEDS, TRIES = "three blue stars at night", 8, 8
CELLS = ("flow", "example", "codes", "flow-best", "codes-best")


def example(pipe: Any, judge: Judge) -> dict[str, Any]:
    """README's example from 8 seeds, each alone: how many show three blue stars at night, and the seconds of each."""
    out: dict[str, Any] = {}
    for tries in (1, TRIES):
        right, seconds = 0, []
        for seed in range(SEEDS):
            begun = time.monotonic()
            options = {"best_of": tries} if tries > 1 else {}
            drawn = pipe(EXAMPLE, generator=torch.Generator().manual_seed(seed), output_type="pt", **options).images
            seconds.append(time.monotonic() - begun)
            reading = judge.read((drawn * 255).round().to(torch.uint8))[0]
            blue = [one for one in reading.objects if one.object == "star" and one.answers_to("blue")]
            right += len(blue) == len(reading.objects) == 3 and reading.background == "night"
        out[f"best_of {tries}"] = {
            "right": right,
            "of": SEEDS,
            "median_seconds": round(sorted(seconds[1:])[len(seconds[1:]) // 2], 4),
            "total_seconds": round(sum(seconds), 3),
        }
    return out


def cell(name: str, pipe: Any, judge: Judge, given: argparse.Namespace) -> dict[str, Any]:
    """One cell's report."""
    if name == "example":
        return example(pipe, judge)
    mode, _, best = name.partition("-")
    config = ComposeConfig(
        mode=mode, limit=given.limit, pictures=given.pictures, batch_size=given.batch_size, best_of=TRIES if best else 1
    )
    return evaluate_wording(pipe, judge, config, settings={"model": given.model})


def line(name: str, report: dict[str, Any]) -> str:
    """One line of the table."""
    if name == "example":
        found = {key: report[key] for key in report if key.startswith("best_of")}
        return f"{name:11}" + ", ".join(
            f"{key}: {row['right']} of {row['of']} right, {row['median_seconds']:.3f} s" for key, row in found.items()
        )
    change, plain = report["change"], report["plain"]["overall"]
    return (
        f"{name:11}other words {report['overall']:.3f}, plain {plain:.3f}, change {change['score']:+.3f} "
        f"[{change['low']:+.3f}, {change['high']:+.3f}], counting {report['tasks']['counting']['score']:.3f}, "
        f"{report['seconds']:.0f} s"
    )


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="mm-tiny")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--limit", type=int, help="prompts a task")
    parser.add_argument("--pictures", type=int, default=4, help="a prompt")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--json", type=Path, default=Path("gpu_words.json"))
    given = parser.parse_args()
    begun = time.monotonic()
    pipe = mm.load(given.model).pipeline_for("draw")
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.from_pretrained().to(pipe.device)
    cells: dict[str, Any] = {}
    report: dict[str, Any] = {"device": str(pipe.device), "cells": cells, "left_out": []}
    warnings.simplefilter("ignore")
    for name in given.cells:
        started = time.monotonic()
        if started - begun > given.seconds:
            report["left_out"].append(name)
        else:
            cells[name] = cell(name, pipe, judge, given)
            cells[name]["seconds"] = round(time.monotonic() - started, 2)
        write_json(given.json, report)
    print(f"{given.model} on {report['device']}, left out: {', '.join(report['left_out']) or 'nothing'}")
    for name, one in cells.items():
        print(line(name, one))


if __name__ == "__main__":
    main()
