"""`python -m mm.evaluation.erase_table`: all methods on all columns, as JSON and as the table in docs/erasure.md.

Every method erases the same targets alone and is measured on held-out prompts, under the same attacks and the same
quantization. Results of finished methods are kept in the JSON file, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.core.files import write_json, write_text
from mm.core.safe_json import read_object
from mm.erasure.methods.registry import METHODS
from mm.evaluation.erase import EraseConfig, evaluate_erase
from mm.evaluation.erase_attacks import NAMES

START, END = "<!-- table of methods: begin -->", "<!-- table of methods: end -->"
RATES = {"UA": "UA", "IRA": "IRA", "CRA": "CRA", "wording": "wording", "lookalike": "look-alikes"}


def measure(pipe: Any, judge: Any, method: str, config: EraseConfig, kept: dict[str, Any]) -> dict[str, Any]:
    """One row: the report of a method on the config's targets."""
    chosen = EraseConfig(
        method=method, targets=config.targets, each=config.each, attacks=config.attacks, quantize=config.quantize,
        seed=config.seed,
    )  # fmt: skip
    return evaluate_erase(pipe, judge, chosen, kept=kept)


def row(report: Mapping[str, Any]) -> dict[str, str]:
    """A row's cells by column."""
    concepts = list(report["concepts"].values())
    cells = {title: f"{report['tasks'][name]['score']:.2f}" for name, title in RATES.items()}
    made = [c["seconds"]["make"] for c in concepts if c["seconds"]["make"] is not None]
    cells["seconds"] = f"{sum(made) / len(made):.0f}" if made else ""
    for name in concepts[0]["quantized"]:
        rates = [c["quantized"][name]["rates"] for c in concepts]
        cells[f"{name} UA / IRA"] = " / ".join(f"{_mean(rates, k):.2f}" for k in ("UA", "IRA"))
    for name in concepts[0]["attacks"]:
        found = [c["attacks"][name]["success"]["score"] for c in concepts]
        cells[name] = f"{sum(x or 0.0 for x in found) / len(found):.2f}"
    return cells


def _mean(rates: list[Mapping[str, Any]], name: str) -> float:
    return sum(r[name]["score"] or 0.0 for r in rates) / len(rates)


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown, methods as columns so that it fits a page."""
    rows = {method: row(report) for method, report in reports.items()}
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    lines += [f"| {c} | " + " | ".join(cells.get(c, "") for cells in rows.values()) + " |" for c in columns]
    return "\n".join(lines)


def write_into(page: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts the table between its marks in a page."""
    text = page.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    write_text(page, f"{before}{START}\n{table(reports)}\n{END}{after}")


def main() -> None:
    """Measures what the JSON file lacks, and writes both."""
    from mm import TextToImagePipeline
    from mm.world.judge import Judge

    parser = argparse.ArgumentParser(description="Measures all methods of erasure on all columns.")
    parser.add_argument("--json", type=Path, required=True, help="kept results, one entry a method")
    parser.add_argument("--page", type=Path, help="a page with the marks of the table")
    parser.add_argument("--target", action="append", help="concepts; default wolf")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="default: all")
    parser.add_argument("--attack", action="append", choices=NAMES, help="default: all")
    parser.add_argument("--quantize", action="append", help="names of quantizations; default int4, none for no re-test")
    parser.add_argument("--limit", type=int, default=8, help="prompts of each role")
    given = parser.parse_args()
    config = EraseConfig(
        targets=tuple(given.target or ("wolf",)), each=given.limit, attacks=tuple(given.attack or NAMES),
        quantize=tuple(q for q in given.quantize or ("int4",) if q != "none"),
    )  # fmt: skip
    reports: dict[str, Any] = read_object(given.json, "results") if given.json.is_file() else {}
    pipe, judge = TextToImagePipeline.from_pretrained("mm-tiny"), Judge.from_pretrained()
    kept: dict[str, Any] = {}
    for method in given.method or METHODS:
        if method not in reports:
            reports[method] = measure(pipe, judge, method, config, kept)
            write_json(given.json, reports)
            print(method, json.dumps(row(reports[method])), flush=True)
    if given.page is not None:
        write_into(given.page, {m: reports[m] for m in METHODS if m in reports})


if __name__ == "__main__":
    main()
