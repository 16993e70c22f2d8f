"""What `mm eval` prints of its reports: a line a task, or a table.

Functions print, but for those that give a table of rich, which `show` prints.
"""

from __future__ import annotations

import sys
from typing import Any


def shares(report: dict[str, Any], what: str) -> None:
    """The overall score, and a line for each task."""
    print(f"overall {report['overall']:.3f} of {what} (ceiling {report['ceiling']:.3f})")
    for name, task in report["tasks"].items():
        print(f"{name:13} {task['score']:.3f}  [{task['low']:.3f}, {task['high']:.3f}]  n {task['n']}")


def show(table: Any) -> None:
    """Prints a table."""
    from rich.console import Console

    # A pipe has no width of its own, and rich would squeeze the columns into 80.
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def wording(report: dict[str, Any]) -> Any:
    """The table of compose in other words, beside plain ones."""
    from rich.table import Table

    settings, plain = report["settings"], report["plain"]
    table = Table(title=f"compose in other words, {settings['mode']}, {report['n']} pictures each")
    for name in ("task", "other words", "plain", "read", "in silence", "of"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name in [*report["tasks"], "overall", "style", "background"]:
        said = report["reading"].get("all" if name == "overall" else name, {})
        rows = [r[name] if name == "overall" else r["tasks"].get(name, r.get(name))["score"] for r in (report, plain)]
        scores = ("" if x is None else f"{x:.3f}" for x in rows)
        table.add_row(name, *scores, *(str(said.get(key, "")) for key in ("read", "silent", "n")))
    change = report["change"]
    table.caption = f"change {change['score']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] of a picture"
    return table


def compose(report: dict[str, Any]) -> Any:
    """The table of compose, with the judge's ceilings."""
    from rich.table import Table

    table = Table(title=f"compose, {report['settings']['mode']}, {report['n']} pictures")
    for name in ("task", "score", "95 % interval", "n", "ceiling: renders", "reconstructed"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, row in report["tasks"].items():
        top = report["ceiling_tasks"][task]
        cells = (f"{row['score']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}", str(row["n"]))
        table.add_row(task, *cells, f"{top['renders']:.3f}", f"{top['reconstructed']:.3f}")
    tops = (f"{report['ceiling']:.3f}", f"{report['ceiling_reconstructed']:.3f}")
    table.add_row("overall", f"{report['overall']:.3f}", "", str(report["n"]), *tops, style="bold")
    for name in ("style", "background", "invalid"):
        row = report[name]
        if row["n"] == 0:  # no prompt names one
            continue
        table.add_row(name, f"{row['score']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}", str(row["n"]), "", "")
    return table


def reconstruct(report: dict[str, Any]) -> Any:
    """The table of tokenizers by style."""
    from rich.table import Table

    styles = list(next(iter(report["tasks"].values()))["styles"])
    table = Table(title=f"reconstruct, PSNR in dB, {report['n']} pictures")
    for name in ("tokenizer", "bits", "SSIM", "mean", *styles):
        table.add_column(name, justify="left" if name == "tokenizer" else "right")
    for name, row in report["tasks"].items():
        cells = (f"{row['bits']:.0f}", f"{row['ssim']:.3f}", f"{row['score']:.2f}")
        table.add_row(name, *cells, *(f"{row['styles'][style]['score']:.2f}" for style in styles))
    return table


def fidelity(report: dict[str, Any]) -> None:
    """Sharpness of drawn pictures and of renders, and the distances between the two."""
    rows = {"drawn": report | {"score": report["overall"]}, "reconstructed": report["reconstructed"]} | report["tasks"]
    for name, row in rows.items():
        print(f"{name:14} sharpness {row['score']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]  n {row['n']}")
    print(f"Frechet distance {report['frechet']:.3f}, reconstructed {report['frechet_reconstructed']:.3f}, "
          f"between renders {report['frechet_floor']:.3f}")  # fmt: skip


def captions(report: dict[str, Any]) -> None:
    """Facts of descriptions, and the share of questions that were answered with yes."""
    stated, best = report["captions"], report["ceiling_captions"]
    print(f"captions     precision {stated['precision']:.3f} ({best['precision']:.3f}), recall {stated['recall']:.3f} "
          f"({best['recall']:.3f}); yes {report['yes_share']:.2f} of .50")  # fmt: skip


def edit(report: dict[str, Any]) -> None:
    """Success and preservation of edits by kind."""
    print(f"overall {report['overall']:.3f} of {report['n']} edits (ceiling {report['ceiling']:.3f})")
    for kind, task in report["tasks"].items():
        print(f"{kind:12} {task['score']:.3f}  success {task['success']:.3f} [{task['low']:.3f}, {task['high']:.3f}]  "
              f"preservation {task['preservation']:.3f}  n {task['n']}")  # fmt: skip


def customize(report: dict[str, Any]) -> None:
    """Fidelity of learned subjects, and what learning them cost."""
    for name, row in report["tasks"].items():
        print(f"{name:11} fidelity {row['score']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]  n {row['n']}")
    drift = report["drift"]
    print(
        f"fidelity {report['overall']:.3f} (renders {report['ceiling']:.3f}, reconstructed "
        f"{report['ceiling_reconstructed']:.3f}), following {report['following']['score']:.3f} (base "
        f"{report['following_base']['score']:.3f}), leakage {report['leakage']['score']:.3f}"
    )
    both, known = report["together"]["score"], report["together_base"]["score"]
    print(f"beside a companion, both: {both:.3f} (base, with a known object: {known:.3f})")
    print(f"compose {drift['change']:+.3f} [{drift['low']:+.3f}, {drift['high']:+.3f}], {report['seconds']:.0f} s, "
          f"{report['bytes'] >> 10} KiB")  # fmt: skip
