"""Writes `training.md`, the published record of how weights came to be, from the stages' own logs.

    python -m mm.training.journal STATE weights/mm-tiny/training.md

Design choices
- Nothing is typed by hand: data, steps, samples, seconds and curve are read from the logs of the runs that happened.
- A curve is a dozen rows, evenly spaced over the log: enough to see whether more training would help.
- A run that starts from published weights has another run's record before it: what FILE tells already of runs whose
  logs are not in STATE is kept. A run is known by its first line.

This module does not know models.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mm.core.files import write_text

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


def _autoencoder(rows: list[dict[str, Any]]) -> str:
    psnr, steps = ([row for row in rows if key in row] for key in ("psnr", "loss"))
    return f"{table(thinned(steps))}\n\nPSNR (dB) on held-out renders:\n\n{table(thinned(psnr))}"


def _decoder(rows: list[dict[str, Any]]) -> str:
    return f"The autoencoder's decoder alone, latents as they were (`--freeze-encoder`).\n\n{_autoencoder(rows)}"


def _judge(rows: list[dict[str, Any]]) -> str:
    looks = [row for row in rows if "exact" in row]
    return f"`exact`: share of held-out scenes read back without any error.\n\n{table(thinned(looks))}"


def _crisp(rows: list[dict[str, Any]]) -> str:
    note = (
        "The decoder alone, on encoded renders and on latents that the model wrote. `_sharp`: gradient energy of "
        "decoded pictures as a share of renders'. Losses are weighted, and moving averages over about 50 steps."
    )
    looks = [row for row in rows if "psnr" in row]
    steps = table(thinned([row for row in rows if "psnr" not in row]))
    return f"{note}\n\n{steps}\n\nReconstructions of held-out renders (PSNR in dB):\n\n{table(thinned(looks))}"


def _loop(note: str) -> Callable[[list[dict[str, Any]]], str]:
    """What a stage of `mm.training.loop` has logged."""

    def tell(rows: list[dict[str, Any]]) -> str:
        text = f"{note}\n\n{table(thinned([row for row in rows if 'compose' not in row]))}"
        scores = [row for row in rows if "compose" in row]
        if scores:
            text += f"\n\nJudged on the way (a few tuning prompts, averaged weights):\n\n{table(scores)}"
        return text

    return tell


STAGES: tuple[tuple[str, str, Callable[[list[dict[str, Any]]], str]], ...] = (
    ("Autoencoder", "autoencoder/log.txt", _autoencoder),
    ("Decoder", "decoder/log.txt", _decoder),
    ("Judge", "judge/log.txt", _judge),
    ("Drawing", "drawing/log.jsonl", _loop("Losses are moving averages over about 50 steps.")),
    (
        "Understanding encoder",
        "understanding/log.jsonl",
        _loop(
            "In training, `_right`: share of object cells named right; `_found`: of pictures with every centre right."
        ),
    ),
    (
        "Latent stem",
        "stem/log.jsonl",
        _loop("`lost`: share of the variance of the encoder's tokens that latents do not bring back."),
    ),
    (
        "Counter",
        "counter/log.jsonl",
        _loop("`_right`: share of a batch's pictures whose every number is right; samples are new pictures."),
    ),
    (
        "Joint",
        "joint/log.jsonl",
        _loop(
            "Goes on from drawing, or from the published weights; seconds and samples are the run's own. `_right`: "
            "share of spoken words right. `nouns`, `relations`, `looks`, `coming`: losses of what the user's nouns, "
            "looks, and the words before a description's nouns know of their scene (`mm/training/grounding.py`)."
        ),
    ),
    ("Crisp decoder", "crisp/log.jsonl", _crisp),
)


def sections(record: str) -> dict[str, str]:
    """The text below each "## " heading of a record."""
    parts = [part.partition("\n") for part in record.split("\n## ")[1:]]
    return {title.strip(): text.strip() for title, _, text in parts}


def journal(state: Path, earlier: str = "") -> str:
    """The record as Markdown. What an `earlier` record tells of runs whose logs are gone stays as it was told."""
    known = sections(earlier)
    out = [
        "# How these weights were trained",
        "Written by `python -m mm.training.journal` from the runs' own logs. Data: scenes of `mm/world`, drawn without "
        "end; compositions held out by `mm.world.scene.is_held_out` and the eight held-out objects were never shown.",
        f"Device: {device()}, shared with other work: seconds are wall clock. torch {torch.__version__}.",
    ]
    for title, log, tell in STAGES:
        rows = read_log(state / log)
        mark = f"Run {hashlib.blake2s(json.dumps(rows[0]).encode(), digest_size=4).hexdigest()}." if rows else ""
        told = {k: text for k, text in known.items() if k.split(", ")[0] == title and not (mark and mark in text)}
        out += [f"## {name}\n\n{text}" for name, text in told.items()]
        if rows:
            number = f", run {len(told) + 1}" if told else ""
            out.append(f"## {title}{number}\n\n{mark} {tell(rows)}")
    return "\n\n".join(out) + "\n"


def main() -> None:
    """The command."""
    state, target = Path(sys.argv[1]), Path(sys.argv[2])
    write_text(target, journal(state, target.read_text() if target.is_file() else ""))


if __name__ == "__main__":
    main()
