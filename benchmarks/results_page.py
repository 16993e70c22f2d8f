"""Writes docs/results.md from the JSON reports of one session, so that no figure there is typed by hand.

    python benchmarks/results_page.py runs/ docs/results.md

`runs/` holds compose-flow.json, compose-codes.json (`mm eval compose`), reconstruct.json (`mm eval reconstruct`) and
generate.json (`benchmarks/generate.py`); what is missing is left out of the page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mm.files import write_text


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A report, or None where it was not made."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def compose_section(report: dict[str, Any]) -> str:
    """One compose run."""
    s = report["settings"]
    command = f"mm eval compose --mode {s['mode']} --seed {s['seed']} --guidance {s['guidance']} --steps {s['steps']}"
    command += f" --pictures {s['pictures']}" + (f" --limit {s['limit']}" if s["limit"] else "")
    rows = []
    for task, row in report["tasks"].items():
        top = report["ceiling_tasks"][task]
        interval = f"{row['low']:.3f} - {row['high']:.3f}"
        rows.append(
            [
                task,
                f"{row['score']:.3f}",
                interval,
                str(row["n"]),
                f"{top['renders']:.3f}",
                f"{top['reconstructed']:.3f}",
            ]
        )
    tops = [f"{report['ceiling']:.3f}", f"{report['ceiling_reconstructed']:.3f}"]
    rows.append(["**overall**", f"**{report['overall']:.3f}**", "", str(report["n"]), *tops])
    for name in ("style", "background", "invalid"):
        row = report[name]
        rows.append([name, f"{row['score']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}", str(row["n"]), "", ""])
    head = ["task", "score", "95 % interval", "n", "ceiling: renders", "reconstructed"]
    return f"## Compose, {s['mode']} mode\n\n`{command}`\n\n{table(head, rows)}"


def reconstruct_section(report: dict[str, Any]) -> str:
    """The tokenizers."""
    styles = list(next(iter(report["tasks"].values()))["styles"])
    rows = [
        [
            name,
            f"{r['bits']:.0f}",
            f"{r['ssim']:.3f}",
            f"{r['score']:.2f}",
            *(f"{r['styles'][s]['score']:.2f}" for s in styles),
        ]
        for name, r in report["tasks"].items()
    ]
    count = report["settings"]["pictures_per_style"]
    note = (
        f"PSNR in dB on held-out renders, {count} a style: `mm eval reconstruct --limit {count} --extra COMPARISONS`."
    )
    return f"## Tokenizers\n\n{note}\n\n{table(['tokenizer', 'bits', 'SSIM', 'mean', *styles], rows)}"


def generate_section(report: dict[str, Any]) -> str:
    """Seconds a picture."""
    rows = [[name, f"{value:.3f}"] for name, value in report.items() if isinstance(value, float)]
    shares = ", ".join(f"{name} {value:.0%}" for name, value in report["shares"].items())
    text = f"`python benchmarks/generate.py`, {report['threads']} threads, seconds (median):"
    body = table(["what", "seconds"], rows)
    return f"## Speed on two CPU cores\n\n{text}\n\n{body}\n\nShares of a default picture: {shares}."


def main() -> None:
    """Writes the page."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    parts = [
        "# Results of weights/mm-tiny",
        "Written by `benchmarks/results_page.py` from reports; see docs/evaluation.md.",
    ]
    makers = {
        "compose-flow": compose_section,
        "compose-codes": compose_section,
        "reconstruct": reconstruct_section,
        "generate": generate_section,
    }
    for name, make in makers.items():
        report = read(folder, name)
        if report is not None:
            parts.append(make(report))
    write_text(target, "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
