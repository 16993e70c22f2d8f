"""OpenMP's threads: a bounded spin, set before torch loads, and a team that is released after the work.

Design choices
- By default threads of GNU's OpenMP spin for milliseconds while they wait. As soon as another process wants a core, the
  thread that is waited for is not running, and those that spin keep it from running: a picture of a second took up to
  45 s. Threads that sleep at once (`OMP_WAIT_POLICY=passive`) avoid that, but on an idle machine waking them for each
  small operation doubles a small model's time.
- Commands set a spin that ends after some 0.1 ms, and let threads sleep at once while other processes want the cores
  (`mm.core.busy_cores`). `benchmarks/busy.py` measures both.
- The variables are read when the OpenMP library is loaded, that is with torch. Only the commands set them; `import mm`
  in a script changes nothing of the process.
- GNU's OpenMP keeps a team of threads for each thread that has computed. As soon as all teams together have more
  threads than the machine has cores, none of them spins for longer than about a microsecond, and each small operation
  wakes sleeping threads. `release_team` ends the calling thread's team: a process that computes in one thread at a
  time then has one team at a time. A new team costs some 50 microseconds a core.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

SPIN_COUNT = 10_000  # turns of GNU's waiting loop (see benchmarks/busy.py)
BLOCK_TIME = "1"  # milliseconds that Intel's and LLVM's OpenMP spin before they sleep
_GNU, _LLVM = "GOMP_SPINCOUNT", "KMP_BLOCKTIME"
_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0, section 3.2.43
_POLICY = ("OMP_WAIT_POLICY", _GNU, _LLVM)


def bound_spinning(environment: MutableMapping[str, str] | None = None) -> bool:
    """Sets a bounded spin, unless the user has set how threads wait; call it before torch is imported.

    Args:
        environment: where variables are set; by default the process's own.

    Returns:
        Whether it has set anything.
    """
    environment = os.environ if environment is None else environment
    if any(name in environment for name in _POLICY):
        return False
    environment[_GNU] = str(SPIN_COUNT)
    environment[_LLVM] = BLOCK_TIME
    return True


def release_team() -> bool:
    """Ends the idle OpenMP threads that wait for more work of the calling thread; its next operation starts new ones.

    Returns:
        Whether there is a GNU OpenMP of torch that can do so. Others (macOS, Windows) are left as they are.
    """
    library = gnu_openmp() if "torch" in sys.modules else None
    return library is not None and library.omp_pause_resource_all(_PAUSE_HARD) == 0


@functools.cache
def gnu_openmp() -> Any:
    """The GNU OpenMP library that torch has loaded, or None."""
    try:
        files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
        found = [ctypes.CDLL(file, mode=os.RTLD_NOLOAD | os.RTLD_LAZY) for file in sorted(files, key=_beside_torch)]
    except OSError:
        return None
    return next((library for library in found if hasattr(library, "omp_pause_resource_all")), None)


def _beside_torch(file: str) -> bool:
    """False, which sorts first, for a file in torch's own folder; other packages bring libraries of their own."""
    return Path(sys.modules["torch"].__path__[0]) not in Path(file).parents


def policy(environment: MutableMapping[str, str] | None = None) -> str:
    """How threads wait, as one line for `mm doctor`."""
    environment = os.environ if environment is None else environment
    given = [f"{name}={environment[name]}" for name in _POLICY if name in environment]
    if given == [f"{_GNU}={SPIN_COUNT}", f"{_LLVM}={BLOCK_TIME}"]:
        return (
            "threads spin for a bounded time, then sleep, and sleep at once while other processes want the cores "
            f"({', '.join(given)}, set by mm)"
        )
    if given:
        return f"as the environment says ({', '.join(given)})"
    return "threads spin while they wait, the default of OpenMP: slow on a busy machine"


def load() -> tuple[float, int] | None:
    """Processes that want a core (average over the last minute) and the cores of this process; None on Windows."""
    if not hasattr(os, "getloadavg"):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return round(os.getloadavg()[0], 2), cores
