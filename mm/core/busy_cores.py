"""Waiting OpenMP threads sleep at once while other processes want the cores, and spin while they do not.

Design choices
- No fixed spin suits both cases (`benchmarks/busy.py`): without spinning, mm-tiny takes 1.8 times as long on an idle
  machine; with it, 5 times as long beside one busy process.
- GNU's OpenMP reads its spin count once, when it is loaded. But it hardly spins while all teams together have more
  threads than there are cores (`mm.core.threads`). So a thread here keeps a second, sleeping team while the machine is
  busy. The number of threads that compute does not change, and so results keep their bits.
- The load is what `/proc/stat` counts for the whole machine, less the processor time of this process. Other systems
  have no such file and no GNU OpenMP, and nothing is done there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mm.core.threads import gnu_openmp

INTERVAL = 0.2  # seconds between two readings
SHARE = 0.3  # of a core that this process lacks, from which on it counts as disturbed
CALM = 5  # intervals without disturbance, after which threads spin again
_STAT = Path("/proc/stat")
_TEAM = 1 << 17  # elements; torch divides an operation on so many among its threads


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Processor time so far, in seconds.

    Attributes:
        machine: of all processes on all cores, and what the host of a virtual machine has taken.
        own: of this process.
        at: when it was read, by a clock that never goes back.
    """

    machine: float
    own: float
    at: float

    @classmethod
    def read(cls) -> Usage:
        """The usage now.

        Raises:
            OSError: Where the system does not count it.
        """
        fields = _STAT.read_text().partition("\n")[0].split()[1:9]
        user, nice, system, _idle, _waiting, *interrupts = (int(x) for x in fields)
        seconds = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        times = os.times()
        return cls(machine=seconds, own=times.user + times.system, at=time.monotonic())

    def others_since(self, before: Usage) -> float:
        """Cores that other processes have used on average since an earlier reading."""
        return ((self.machine - before.machine) - (self.own - before.own)) / max(1e-9, self.at - before.at)


class SleepingTeam:
    """A second OpenMP team, in a thread that only holds it."""

    def __init__(self) -> None:
        self._end, self._made = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, name="mm-sleeping-team", daemon=True)
        self._thread.start()
        self._made.wait()

    def _hold(self) -> None:
        import torch

        torch.ones(_TEAM).exp_()
        self._made.set()
        self._end.wait()

    def end(self) -> None:
        """Ends the team with its thread."""
        self._end.set()
        self._thread.join()


class Watch:
    """Decides after each interval whether this process is disturbed, and keeps a sleeping team while it is.

    Args:
        cores: of the machine.
    """

    def __init__(self, cores: int) -> None:
        self.cores, self.calm = cores, 0
        self.team: SleepingTeam | None = None

    def step(self, others: float, threads: int) -> None:
        """Takes one measurement.

        Args:
            others: cores that other processes use.
            threads: that this process computes with.
        """
        disturbed = others > self.cores - threads + SHARE
        self.calm = 0 if disturbed else self.calm + 1
        if disturbed and self.team is None and threads > 1:
            self.team = SleepingTeam()
        elif self.calm >= CALM and self.team is not None:
            self.team.end()
            self.team = None


def watch_cores() -> threading.Thread | None:
    """Starts the watch as a thread that ends with the process.

    Returns:
        The thread, or None on a system that does not count processor time.
    """
    try:
        first = Usage.read()
    except (OSError, ValueError, AttributeError):  # no such file, another layout, or Windows
        return None
    thread = threading.Thread(target=_run, args=(first,), name="mm-watch-cores", daemon=True)
    thread.start()
    return thread


def _run(before: Usage) -> None:
    watch = Watch(os.cpu_count() or 1)
    while True:
        time.sleep(INTERVAL)
        torch = sys.modules.get("torch")
        if torch is None or getattr(torch.__spec__, "_initializing", False):
            continue
        if gnu_openmp() is None:
            return
        now = Usage.read()
        watch.step(now.others_since(before), torch.get_num_threads())
        before = now
