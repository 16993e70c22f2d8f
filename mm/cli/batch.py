"""`mm batch`: a file of jobs into a folder of pictures."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm batch examples/jobs.jsonl -o runs/monday")
def batch(
    jobs: Annotated[Path, typer.Argument(help='JSON Lines of {"custom_id", "task", "body"}; see docs/batch.md.')],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for pictures, records and manifests.")],
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Pictures drawn at once; changes no picture.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Run seed, for the rows that give none.")] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Draw what failed in an earlier run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check rows and count; draw and write nothing.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
) -> None:
    """Runs a file of jobs; what is done already is skipped.

    Exit code 0: all done. 2: some rows failed. 1: could not start. 130: stopped; run it again to go on.
    """
    from tqdm import tqdm

    from mm.batch.run import Progress, run_jobs

    with _stop_signals() as stopped, tqdm(unit="picture", disable=dry_run or None, file=sys.stderr) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.total
            bar.set_postfix(failed=progress.failed, refresh=False)
            bar.update(progress.drawn + progress.skipped + progress.failed - bar.n)

        report = run_jobs(
            jobs,
            out,
            model=model,
            batch_size=batch_size,
            seed=seed,
            retry_failed=retry_failed,
            dry_run=dry_run,
            limit=limit,
            stop=lambda: bool(stopped),
            on_progress=show,
        )
    for error in report.errors:
        print(f"mm: {error}", file=sys.stderr)
    undone = f"{report.missing} to draw" if dry_run else f"{report.drawn} drawn"
    print(f"{report.rows} rows, {report.total} pictures: {undone}, {report.skipped} there, {report.failed} failed")
    if report.stopped:
        print("mm: stopped; nothing is half-written, run it again to go on", file=sys.stderr)
        raise typer.Exit(130)
    if report.failed:
        raise typer.Exit(2)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl+C fills, so that a picture and its record are kept together; the second one ends at once."""
    stopped: list[int] = []
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        stopped.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for kind in before:
        signal.signal(kind, note)
    try:
        yield stopped
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
