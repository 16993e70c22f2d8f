"""Writes `training.md`, the published record of how weights were trained, from the stages' logs.

    python -m mm.training.journal STATE weights/mm-tiny/training.md

Design choices
- Nothing is typed by hand: data, steps, samples, seconds and curve are read from the logs of the runs.
- A curve is a dozen rows, evenly spaced over the log: enough to see whether more training would help.
- A run that starts from published weights has the record of another run before it: sections of FILE about runs whose
  logs are not in STATE are kept. A run is identified by the first line of its log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mm.core.files import write_text

_ROWS = 14


def read_log(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a log; other lines (warnings, tracebacks) are skipped."""
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
    """A description of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {capability}), bf16 autocast"


def _trained(note: str, score: str = "", about: str = "") -> Callable[[list[dict[str, Any]]], str]:
    """Writes what the trainer has logged: losses, and rows that hold `score` in a table of their own."""

    def section(rows: list[dict[str, Any]]) -> str:
        losses = [row for row in rows if not score or score not in row]
        scores = [row for row in rows if score and score in row]
        text = f"{note}\n\n{table(thinned(losses))}"
        return text + (f"\n\n{about}:\n\n{table(thinned(scores))}" if scores else "")

    return section


_PSNR = ("psnr", "PSNR (dB) on held-out renders")
_COMPOSE = ("compose", "Previews (a few tuning prompts, averaged weights)")
STAGES: tuple[tuple[str, str, Callable[[list[dict[str, Any]]], str]], ...] = (
    ("Autoencoder", "autoencoder", _trained("Losses are moving averages over about 50 steps.", *_PSNR)),
    ("Decoder", "decoder", _trained("The decoder alone, latents unchanged (`--freeze-encoder`).", *_PSNR)),
    (
        "Judge",
        "judge",
        _trained("Weighted losses.", "exact", "`exact`: share of fresh renders that are read without any error"),
    ),
    ("Drawing", "drawing", _trained("Losses are moving averages over about 50 steps.", *_COMPOSE)),
    (
        "Understanding encoder",
        "understanding",
        _trained("On training data, `_right`: share of object cells; `_found`: of pictures with every centre right."),
    ),
    (
        "Latent stem",
        "stem",
        _trained("`lost`: share of the variance of the encoder's tokens that is not recovered from latents."),
    ),
    (
        "Counter",
        "counter",
        _trained("`_right`: share of a batch's pictures with every count right; samples are new pictures."),
    ),
    (
        "Joint",
        "joint",
        _trained(
            "Continues the drawing stage, or published weights; seconds and samples are the run's own. `_right`: share "
            "of generated words right. `nouns`, `relations`, `tokens`, `next_nouns`: auxiliary losses "
            "(`mm/training/readouts.py`).",
            *_COMPOSE,
        ),
    ),
    (
        "Crisp decoder",
        "crisp",
        _trained(
            "The decoder alone, on encoded renders and on latents that the model wrote. `_sharp`: gradient energy of "
            "decoded pictures as a share of renders'. Losses are weighted, and moving averages over about 50 steps.",
            *_PSNR,
        ),
    ),
    (
        "Enlarger",
        "enlarger",
        _trained(
            "The enlarger alone, on renders at twice the side. `_sharp`: gradient energy of its pictures as a share of "
            "renders'. `psnr_plain`, `sharp_plain`: of the picture of plain size, enlarged.",
            *_PSNR,
        ),
    ),
    (
        "Fingerprint",
        "fingerprint",
        _trained(
            "`read`: share of bits read after attacks of `strength`; `decibels`: what picture quality loses, and "
            "`budget`, what it may. Running means.",
            "found_in_plain", "The written file on held-out renders",
        ),
    ),
)  # fmt: skip


def sections(record: str) -> dict[str, str]:
    """The text below each "## " heading of a record."""
    parts = [part.partition("\n") for part in record.split("\n## ")[1:]]
    return {title.strip(): text.strip() for title, _, text in parts}


def journal(state: Path, earlier: str = "") -> str:
    """The record as Markdown. Sections of an `earlier` record about runs that are not in `state` are kept unchanged."""
    known = sections(earlier)
    out = [
        "# How these weights were trained",
        "Written by `python -m mm.training.journal` from the runs' own logs. Data: scenes of `mm/world`, sampled "
        "without end; compositions held out by `mm.world.scene.is_held_out` and the eight held-out objects were never "
        "shown.",
        f"Device: {device()}, shared with other work: seconds are wall clock. torch {torch.__version__}.",
    ]
    for title, folder, section in STAGES:
        rows = read_log(state / folder / "log.jsonl")
        mark = f"Run {hashlib.blake2s(json.dumps(rows[0]).encode(), digest_size=4).hexdigest()}." if rows else ""
        kept = {k: text for k, text in known.items() if k.split(", ")[0] == title and not (mark and mark in text)}
        out += [f"## {name}\n\n{text}" for name, text in kept.items()]
        if rows:
            number = f", run {len(kept) + 1}" if kept else ""
            out.append(f"## {title}{number}\n\n{mark} {section(rows)}")
    return "\n\n".join(out) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Writes a run's journal from its state folder.")
    parser.add_argument("state", type=Path, help="the state folder of a run")
    parser.add_argument("target", type=Path, help="the page to write, or to bring up to date")
    given = parser.parse_args()
    state, target = given.state, given.target
    write_text(target, journal(state, target.read_text() if target.is_file() else ""))


if __name__ == "__main__":
    main()
