"""Writes `training.md`, the published record of how weights came to be, from the stages' own logs.

    python -m mm.training.journal STATE weights/mm-tiny/training.md

Design choices
- Nothing is typed by hand: data, steps, samples, seconds and curve are read from the logs of the runs that happened.
- A curve is a dozen rows, evenly spaced over the log: enough to see whether more training would help.

This module does not know models.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from mm.files import write_text

_ROWS = 14


def read_log(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a log; other lines (warnings, tracebacks) are passed over."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.startswith("{")]


def thinned(rows: list[dict[str, Any]], n: int = _ROWS) -> list[dict[str, Any]]:
    """About `n` evenly spaced rows, the last one always."""
    step = max(1, len(rows) // n)
    return [*rows[:-1:step], rows[-1]] if rows else []


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table over the union of the rows' keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in keys)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return "" if value is None else str(value)


def device() -> str:
    """The machine in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {capability}), bf16 autocast"


def journal(state: Path) -> str:
    """The record as Markdown."""
    out = [
        "# How these weights were trained",
        "",
        "Written by `python -m mm.training.journal` from the runs' own logs. Data: scenes of `mm/world`, drawn without "
        "end; compositions held out by `mm.world.scene.is_held_out` and the eight held-out objects were never shown.",
        "",
        f"Device: {device()}, shared with other work: seconds are wall clock. torch {torch.__version__}.",
    ]
    tokenizer = read_log(state / "autoencoder" / "log.txt")
    psnr = [row for row in tokenizer if "psnr" in row]
    steps = [row for row in tokenizer if "loss" in row]
    out += [
        "",
        "## Autoencoder",
        "",
        table(thinned(steps)),
        "",
        "PSNR (dB) on held-out renders:",
        "",
        table(thinned(psnr)),
    ]
    judge = read_log(state / "judge" / "log.txt")
    looks = [row for row in judge if "exact" in row]
    out += [
        "",
        "## Judge",
        "",
        "`exact`: share of held-out scenes read back without any error.",
        "",
        table(thinned(looks)),
    ]
    drawing = read_log(state / "drawing" / "log.jsonl")
    losses = [row for row in drawing if "flow" in row or "codes" in row]
    scores = [row for row in drawing if "compose" in row]
    out += ["", "## Drawing", "", "Losses are moving averages over about 50 steps.", "", table(thinned(losses))]
    if scores:
        out += ["", "Judged on the way (tuning prompts, averaged weights):", "", table(scores)]
    for title, folder, note in (
        (
            "Understanding encoder",
            "understanding",
            "`_right`: share of object cells named right, on training pictures.",
        ),
        (
            "Joint",
            "joint",
            "Goes on from drawing: seconds and samples count on. `_right`: share of spoken words right.",
        ),
    ):
        rows = read_log(state / folder / "log.jsonl")
        if rows:
            out += ["", f"## {title}", "", note, "", table(thinned([row for row in rows if "compose" not in row]))]
            if scores := [row for row in rows if "compose" in row]:
                out += ["", "Judged on the way (a few tuning prompts, averaged weights):", "", table(scores)]
    return "\n".join(out) + "\n"


def main() -> None:
    """The command."""
    write_text(Path(sys.argv[2]), journal(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
