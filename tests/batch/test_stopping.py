"""A run that is stopped leaves whole pictures; exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_rows import row, write
from typer.testing import CliRunner

import mm.cli
from mm.batch import run_jobs
from mm.core.errors import UserError


@pytest.mark.parametrize("asked", [1, 4, 7])
def test_a_stop_leaves_whole_pictures_and_the_next_run_goes_on(tmp_path, counting, asked):
    jobs, times = write(tmp_path / "j", *(row(str(k), seed=k) for k in range(5))), iter(range(100))
    report = run_jobs(jobs, tmp_path / "out", batch_size=2, load=counting.load, stop=lambda: next(times) >= asked)
    assert report.stopped and report.drawn < 5 and not report.failed
    kept = {kind: {p.stem for p in (tmp_path / "out").rglob(f"*.{kind}")} for kind in ("png", "json")}
    assert kept["png"] == kept["json"] and len(kept["png"]) == report.drawn
    assert not list(tmp_path.rglob(".*"))
    again = run_jobs(jobs, tmp_path / "out", load=counting.load)
    assert (again.drawn, again.skipped, again.stopped) == (5 - report.drawn, report.drawn, False)


def test_a_second_run_in_a_folder_is_refused_while_the_first_draws(tmp_path, counting):
    jobs, refused = write(tmp_path / "j", row("a"), row("b")), []

    def second():
        with pytest.raises(UserError, match=r"another mm batch is drawing into .*out") as caught:
            run_jobs(jobs, tmp_path / "out", load=counting.load)
        refused.append(caught.value)
        assert run_jobs(jobs, tmp_path / "out", dry_run=True).missing == 2

    report = run_jobs(jobs, tmp_path / "out", load=counting.load, on_drawing=second)
    assert refused and report.drawn == 2 and counting.drawn == 2
    assert run_jobs(jobs, tmp_path / "out", load=counting.load).skipped == 2


def test_a_run_that_cannot_draw_leaves_no_folder(tmp_path):
    def load(_name):
        raise UserError("no model")

    with pytest.raises(UserError, match="no model"):
        run_jobs(write(tmp_path / "j", row("a")), tmp_path / "out", load=load)
    assert not (tmp_path / "out").exists()


def test_stop_is_asked_while_rows_are_read(tmp_path, counting):
    jobs = write(tmp_path / "j", *[row(f"r{k}") for k in range(50)])
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > after

    for after in (10, 60):  # while reading, while looking for what is there
        asked.clear()
        report = run_jobs(jobs, tmp_path / "out", load=counting.load, dry_run=True, stop=stop)
        assert report.stopped and len(asked) == after + 1
    assert not counting.loads and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("dry", [True, False])
def test_one_signal_ends_a_run_that_reads_rows(tmp_path, kind, code, dry):
    """A dry run of many rows, and a real one that checks what is there."""
    jobs = tmp_path / "j"
    jobs.write_text("".join(json.dumps(row(f"r{k}")) + "\n" for k in range(100_000)))
    command = [sys.executable, "-m", "mm", "batch", str(jobs), "-o", str(tmp_path / "out")]
    run = subprocess.Popen(command + ["--dry-run"] * dry, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{run.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.05)  # until the command handles signals
    time.sleep(0.5)
    run.send_signal(kind)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == code
    assert errors.strip().splitlines()[-1] == "mm: stopped; nothing is half-written, run it again to go on"
    assert not (tmp_path / "out").exists()


def test_exit_codes(tmp_path, counting, monkeypatch):
    monkeypatch.setattr("mm.batch.run._load", lambda model, **_: counting.engine)
    before = signal.getsignal(signal.SIGINT)
    good, mixed = write(tmp_path / "good", row()), write(tmp_path / "mixed", row(), "{")

    def code(*arguments):
        return CliRunner().invoke(mm.cli.app, ["batch", *map(str, arguments), "-o", str(tmp_path / "out")])

    done = code(good)
    assert done.exit_code == 0 and "1 drawn" in done.stdout, done.output
    done = code(mixed)
    assert done.exit_code == 2 and "mm: line 2: it is no JSON" in done.stderr and "1 there, 1 failed" in done.stdout
    assert signal.getsignal(signal.SIGINT) is before
    assert code(tmp_path / "none").exit_code == 1
    assert code(write(tmp_path / "empty")).exit_code == 1
    assert code(good, "--batch-size", 0).exit_code == 2
