"""`mm batch`: a file of jobs into a folder of pictures."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mm.cli import options as shared
from mm.core.checks import MAX_SEED
from mm.core.nouns import counted

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm batch examples/jobs.jsonl -o runs/monday")
def batch(
    jobs: Annotated[Path, typer.Argument(help='JSON Lines of {"custom_id", "task", "body"}; see docs/batch.md.')],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for pictures, records and manifests.")],
    model: shared.ModelOption = "mm-tiny",
    base: shared.BaseOption = None,
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    offload: shared.OffloadOption = shared.OffloadTo.auto,
    dtype: shared.DtypeOption = shared.Dtype.auto,
    root: Annotated[
        Path | None, typer.Option(help="Folder under which files lie that rows name (default: the job file's).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Pictures drawn at once; changes no picture.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Run seed, for the rows that give none.")] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Draw what failed in an earlier run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check rows against the model and count; load no weights, write nothing.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
) -> None:
    """Runs a file of jobs; what is done already is skipped.

    The same seed gives the same picture at any batch size, as in mm generate and in Python: within 2 of 255 a pixel on
    CPUs, and bit for bit with 4- and 8-bit weights, whose pictures are drawn one by one.

    Exit code 0: all done. 2: some rows failed. 1: could not start or go on. 130, 143: stopped by Ctrl+C, by SIGTERM;
    run it again to go on.
    """
    with _stop_signals() as stopping:
        try:
            _run(
                stopping, jobs, out, batch_size=batch_size, seed=seed, retry_failed=retry_failed, dry_run=dry_run,
                limit=limit, root=root, model=model, base=base, bits=None if bits is None else int(bits),
                adapters=[shared.adapter(text) for text in lora or ()], offload=offload.value, dtype=dtype.value,
            )  # fmt: skip
        except _Stopped:
            stopping.leave()


def _run(stopping: _Stopping, jobs: Path, out: Path, *, dry_run: bool, **options: Any) -> None:
    """Runs the jobs and prints what was done."""
    from tqdm import tqdm

    from mm.batch.run import Progress, run_jobs

    with tqdm(unit="picture", disable=dry_run or None, file=sys.stderr) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.total
            bar.set_postfix(failed=progress.failed, refresh=False)
            bar.update(progress.drawn + progress.skipped + progress.failed - bar.n)

        report = run_jobs(
            jobs,
            out,
            dry_run=dry_run,
            stop=lambda: stopping.number is not None,
            on_drawing=stopping.hold,
            on_progress=show,
            **options,
        )
    for error in report.errors:
        print(f"mm: {error}", file=sys.stderr)
    undone = f"{report.missing} to draw" if dry_run else f"{report.drawn} drawn"
    print(
        f"{counted(report.rows, 'row')}, {counted(report.total, 'picture')}: {undone}, "
        f"{report.skipped} there, {report.failed} failed"
    )
    if report.stopped:
        stopping.leave()
    if report.failed:
        raise typer.Exit(2)


class _Stopped(BaseException):
    """Raised by a signal before drawing.

    It is no KeyboardInterrupt: once one has passed through `exec` of a string (dataclasses are made so while modules
    are imported), CPython ends the process by SIGINT, whatever caught it and whatever the exit code.
    """


class _Stopping:
    """What Ctrl+C and SIGTERM do: before drawing they end the command at once, later after the file being written."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.drawing = False

    def note(self, number: int, _: object) -> None:
        """The handler of the first signal; the second one acts as if mm had none."""
        self.number = number
        if not self.drawing:
            raise _Stopped

    def hold(self) -> None:
        """From now on a signal is only noted: a picture and its record are kept together."""
        self.drawing = True

    def leave(self) -> NoReturn:
        """Ends the command as a shell expects of a stopped one: 128 and the signal's number."""
        print("mm: stopped; nothing is half-written, run it again to go on", file=sys.stderr)
        raise typer.Exit(128 + (self.number or signal.SIGINT))


@contextmanager
def _stop_signals() -> Iterator[_Stopping]:
    """Handles the two signals while the command runs."""
    stopping = _Stopping()
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def first(number: int, frame: object) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stopping.note(number, frame)

    for kind in before:
        signal.signal(kind, first)
    try:
        yield stopping
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
