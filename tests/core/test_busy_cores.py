"""How this process notices that others want the cores, and what it does then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm.core import busy_cores
from mm.core.busy_cores import CALM, SHARE, Usage, Watch

_TEAMS = """
import os, time, torch
from mm.core.busy_cores import CALM, Watch
from mm.core.threads import gnu_openmp

assert gnu_openmp() is not None
torch.set_num_threads(2)

def threads():
    return len(os.listdir("/proc/self/task"))

def settled(wanted):
    end = time.monotonic() + 20
    while threads() != wanted and time.monotonic() < end:
        time.sleep(0.01)  # an ended thread leaves the list a moment later
    return threads()

x = torch.ones(1 << 18).exp()
alone, watch = threads(), Watch(cores=2)
watch.step(others=1.0, threads=2)
assert threads() == alone + 2, "a thread and its team of two: itself and another"
watch.step(others=1.0, threads=2)
assert threads() == alone + 2
for _ in range(CALM):
    watch.step(others=0.0, threads=2)
assert settled(alone) == alone
assert torch.equal(torch.ones(1 << 18).exp(), x)
"""


class Team:
    """Counts teams instead of starting threads."""

    made = ended = 0

    def __init__(self) -> None:
        type(self).made += 1

    def end(self) -> None:
        """Counts the end."""
        type(self).ended += 1


@pytest.fixture
def team(monkeypatch):
    fresh = type("Fresh", (Team,), {})
    monkeypatch.setattr(busy_cores, "SleepingTeam", fresh)
    return fresh


def test_usage_is_what_the_kernel_counts_less_idle_time_and_ones_own(tmp_path, monkeypatch):
    """proc(5): user, nice, system, idle, iowait, irq, softirq, steal, in ticks; guest time is part of user time."""
    ticks = os.sysconf("SC_CLK_TCK")
    file = tmp_path / "stat"
    file.write_text(
        f"cpu  {ticks} {2 * ticks} {3 * ticks} 999999 888888 {4 * ticks} {5 * ticks} {6 * ticks} 777 0\ncpu0 1\n"
    )
    monkeypatch.setattr(busy_cores, "_STAT", file)
    found = Usage.read()
    assert found.machine == pytest.approx(21)
    assert 0 < found.own <= sum(os.times()[:2]) + 0.1
    before = Usage(machine=10.0, own=1.0, at=100.0)
    assert Usage(machine=10.5, own=1.2, at=100.2).others_since(before) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("cores", "threads", "others", "disturbed"),
    [
        (2, 2, 0.0, False),
        (2, 2, SHARE + 0.01, True),
        (8, 2, 5.0, False),  # six cores are free for two threads
        (8, 2, 6.5, True),
        (8, 8, 1.0, True),
        (2, 1, 2.0, False),  # one thread waits for none
    ],
)
def test_a_team_is_kept_while_others_want_the_cores(team, cores, threads, others, disturbed):
    watch = Watch(cores)
    for _ in range(3):
        watch.step(others, threads)
    assert team.made == int(disturbed)
    for _ in range(CALM - 1):
        watch.step(0.0, threads)
    assert team.ended == 0, "it ends only after some calm intervals"
    watch.step(0.0, threads)
    assert team.ended == int(disturbed)
    watch.step(float(cores), threads)
    assert team.made == 2 * int(disturbed) + int(not disturbed and threads > 1)


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP and /proc")
def test_a_second_team_comes_and_goes():
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _TEAMS],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_starts_where_processor_time_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(busy_cores, "_STAT", tmp_path / "missing")
    assert busy_cores.watch_cores() is None
