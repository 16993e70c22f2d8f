"""Writes docs/matrix.md: what the commands do with a tiny pipeline of each public family.

    python benchmarks/matrix.py docs/matrix.md
    python benchmarks/matrix.py docs/matrix.md --only aura-flow  # its row alone; the others are kept

The cells are those of tests/engine_matrix.py and tests/engine_matrix_patches.py, in their order.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import mm  # noqa: F401 - before diffusers and transformers, see docs/quickstart.md

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
Results = dict[str, dict[str, str | None]]


def page(results: Results, cells: list[str]) -> str:
    """The table as Markdown, with the reasons below it."""
    lines = [
        "# Public families",
        "",
        "What the commands do with a tiny random model of each family, of diffusers' real classes; reasons stand below",
        "the table. `python benchmarks/matrix.py docs/matrix.md` writes this page, and a test runs the same cells.",
        "",
        f"| family | {' | '.join(f'`{cell}`' for cell in cells)} |",
        f"|---|{'---|' * len(cells)}",
    ]
    reasons = sorted({reason for row in results.values() for reason in row.values() if reason})
    for name, row in results.items():
        marks = ["yes" if row[cell] is None else f"no ({reasons.index(str(row[cell])) + 1})" for cell in cells]
        lines.append(f"| {name} | {' | '.join(marks)} |")
    lines += ["", *(f"{k}. {reason[0].upper()}{reason[1:]}." for k, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


def written(page: Path, cells: list[str]) -> Results:
    """The results that a page has.

    Args:
        page: as `page` writes it.
        cells: that its table must have.

    Raises:
        SystemExit: its table has other cells.
    """
    text = page.read_text(encoding="utf-8")
    rows = [[part.strip(" `") for part in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    if not rows or rows[0][1:] != cells:
        raise SystemExit(f"{page} has other cells than {', '.join(cells)}; write all of it, without --only")
    found = re.findall(r"^([0-9]+)\. (.*)\.$", text, re.MULTILINE)
    reasons = {f"no ({number})": reason[0].lower() + reason[1:] for number, reason in found}
    kept: Results = {}
    for name, *marks in rows[1:]:
        kept[name] = {cell: reasons.get(mark) for cell, mark in zip(cells, marks, strict=True)}
    return kept


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="the page to write")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="run these alone, and keep the page's other rows")
    given = parser.parse_args()
    from engine_matrix import CELLS, Model
    from engine_matrix_patches import CELLS as PATCHES
    from tiny_pipelines import PIPELINES

    warnings.simplefilter("ignore")
    cells = CELLS | PATCHES
    results = written(given.page, list(cells)) if given.only else {}
    if unknown := set(given.only or ()) - set(PIPELINES):
        raise SystemExit(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(PIPELINES)}")
    for name in given.only or PIPELINES:
        with tempfile.TemporaryDirectory() as folder:
            model = Model(name, Path(folder))
            results[name] = {cell: run(model) for cell, run in cells.items()}
            print(name, results[name], file=sys.stderr, flush=True)
        ordered = {name: results[name] for name in PIPELINES if name in results}
        if given.only or len(ordered) == len(PIPELINES):  # a family that fails leaves what was found before
            given.page.write_text(page(ordered, list(cells)), encoding="utf-8")


if __name__ == "__main__":
    main()
