"""`python -m mm.evaluation.erase_table`: measures the cells of docs/erasure.md and writes its tables.

Several processes share the work (`--processes`), and a run that was stopped goes on where it was. Folders of other
machines are merged by naming them with `--also`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mm.evaluation.erase_cells import Cell, Worker, finished, plan, tuning
from mm.evaluation.erase_pages import TABLES, write_into


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the folder lacks, and prints and writes the tables; 1 where cells are missing."""
    parser = argparse.ArgumentParser(description="Measures erasures: all methods, attacks and quantizations.")
    parser.add_argument("--folder", type=Path, required=True, help="one JSON file for each finished cell")
    parser.add_argument("--model", default="mm-tiny", help="an embedded model, a folder, or a hub name")
    parser.add_argument("--only", action="append", help="begin of cells' names, such as attacks/robust; default: all")
    parser.add_argument("--tuning", action="store_true", help="variants of the robust preset, on tuning prompts")
    parser.add_argument("--size", type=float, default=1.0, help="share of the prompts of a full run")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no cell that would end after this")
    parser.add_argument("--processes", type=int, default=1, help="that share the cells")
    parser.add_argument("--also", type=Path, action="append", default=[], help="another folder of finished cells")
    parser.add_argument("--page", type=Path, help="a page with the marks of the tables")
    parser.add_argument("--no-run", action="store_true", help="only write the tables of what is there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    cells = [
        c
        for c in (tuning if given.tuning else plan)(given.size)
        if not given.only or any(c.name.startswith(p) for p in given.only)
    ]
    if not given.no_run:
        _measure(given, cells, list(sys.argv[1:] if arguments is None else arguments))
    if given.worker:
        return 0
    reports = {name: report for folder in (given.folder, *given.also) for name, report in finished(folder).items()}
    for name, table in TABLES.items():
        print(f"\n{name}\n{table(reports)}")
    if given.page is not None:
        write_into(given.page, reports)
    missing = [c.name for c in cells if c.name not in reports]
    print(
        f"\n{len(cells) - len(missing)} of {len(cells)} cells" + (f"; missing: {', '.join(missing)}" if missing else "")
    )
    return 1 if missing else 0


def _measure(given: argparse.Namespace, cells: Sequence[Cell], arguments: Sequence[str]) -> None:
    if not given.worker:
        _free(given.folder, cells)
    if given.processes == 1 or given.worker:
        progress = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        Worker(given.folder, given.model, given.seconds, progress).run(cells)
        return
    command = [sys.executable, "-W", "ignore", "-m", "mm.evaluation.erase_table", *arguments, "--worker"]
    threads = str(max(1, (os.cpu_count() or 1) // given.processes))
    own = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", **os.environ}
    for process in [subprocess.Popen(command, env=own) for _ in range(given.processes)]:
        process.wait()


def _free(folder: Path, cells: Sequence[Cell]) -> None:
    """Takes off the claims of cells that an earlier run did not finish, so that they are made now."""
    done = finished(folder) if folder.is_dir() else {}
    for cell in cells:
        if cell.name not in done:
            for kind in (".claim", ".json"):
                (folder / cell.file).with_suffix(kind).unlink(missing_ok=True)
    for patch in folder.glob("*.claim"):
        if not patch.with_suffix(".safetensors").is_file() and not patch.with_suffix(".json").is_file():
            patch.unlink()


if __name__ == "__main__":
    sys.exit(main())
