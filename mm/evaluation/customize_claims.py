"""`python -m mm.evaluation.customize_claims`: measures what docs/customization.md claims, and writes its table.

A run that was stopped goes on where it was: cells and adapters lie in the folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mm.core.errors import UserError
from mm.core.files import write_json
from mm.evaluation.customize_bench import Bench
from mm.evaluation.customize_cells import Cell, plan
from mm.evaluation.customize_pages import MARK, TABLES
from mm.evaluation.erase_cells import finished
from mm.evaluation.erase_pages import write_into


def fill(bench: Bench, cells: Sequence[Cell], until: float = float("inf")) -> int:
    """Makes the cells that the folder lacks, until the time is up; a failure is kept, and the next cell follows.

    Args:
        bench: with the folder.
        cells: in the order in which they are made.
        until: `time.time` from which no cell begins.

    Returns:
        How many were made.
    """
    made, done = 0, finished(bench.work)
    for cell in cells:
        if cell.name in done or time.time() > until:
            continue
        started = time.monotonic()
        try:
            found = cell.make(bench)
        except (UserError, RuntimeError, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        took = round(time.monotonic() - started, 1)
        write_json(bench.work / cell.file, found | {"cell": cell.name, "took": took})
        bench.progress(f"{cell.name}: {found.get('error', 'done')} ({took} s)")
        made += "error" not in found
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the folder lacks, prints and writes the table; 1 where cells are missing."""
    parser = argparse.ArgumentParser(description="Measures what is claimed of customization.")
    parser.add_argument("--work", type=Path, required=True, help="folder of adapters, and one JSON file a cell")
    parser.add_argument("--model", default="mm-tiny", help="an embedded model, a folder, or a hub name")
    parser.add_argument("--only", action="append", help="begin of cells' names, such as merged/; default: all")
    parser.add_argument("--pictures", type=int, default=1, help="of each prompt")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no cell begins")
    parser.add_argument("--page", type=Path, help="a page with the marks of the table")
    parser.add_argument("--no-run", action="store_true", help="only write the table of what is there")
    given = parser.parse_args(arguments)
    cells = [cell for cell in plan() if not given.only or any(cell.name.startswith(begin) for begin in given.only)]
    given.work.mkdir(parents=True, exist_ok=True)
    if not given.no_run:
        progress = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        bench = Bench(work=given.work, model=given.model, pictures=given.pictures, progress=progress)
        fill(bench, cells, time.time() + given.seconds)
    reports = finished(given.work)
    for table in TABLES.values():
        print(table(reports))
    if given.page is not None:
        write_into(given.page, reports, TABLES, MARK)
    missing = [cell.name for cell in cells if cell.name not in reports]
    note = f"; missing: {', '.join(missing)}" if missing else ""
    print(f"\n{len(cells) - len(missing)} of {len(cells)} cells{note}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
