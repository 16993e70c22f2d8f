"""How OpenMP's threads wait: a bounded spin, set before torch loads, so that a busy machine does not stall them.

Design choices
- By default threads of GNU's OpenMP spin for milliseconds while they wait. As soon as another process wants a core, the
  thread that is waited for is not running, and those that spin keep it from running: a picture of a second took up to
  45 s. Threads that sleep at once (`OMP_WAIT_POLICY=passive`) avoid that, but on an idle machine waking them for each
  small operation doubles a small model's time.
- Both are avoided by a spin that ends after some microseconds. `benchmarks/busy.py` measures it.
- The variables are read when the OpenMP library is loaded, that is with torch. Only the commands set them; `import mm`
  in a script changes nothing of the process.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = 10_000  # turns of GNU's waiting loop (see benchmarks/busy.py)
BLOCK_TIME = "1"  # milliseconds that Intel's and LLVM's OpenMP spin before they sleep
_GNU, _LLVM = "GOMP_SPINCOUNT", "KMP_BLOCKTIME"
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


def policy(environment: MutableMapping[str, str] | None = None) -> str:
    """How threads wait, as one line for `mm doctor`."""
    environment = os.environ if environment is None else environment
    given = [f"{name}={environment[name]}" for name in _POLICY if name in environment]
    if given == [f"{_GNU}={SPIN_COUNT}", f"{_LLVM}={BLOCK_TIME}"]:
        return f"threads spin for a bounded time, then sleep ({', '.join(given)}, set by mm)"
    if given:
        return f"as the environment says ({', '.join(given)})"
    return "threads spin while they wait, the default of OpenMP: slow on a busy machine"


def load() -> tuple[float, int] | None:
    """Processes that want a core (average over the last minute) and the cores of this process; None on Windows."""
    if not hasattr(os, "getloadavg"):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return round(os.getloadavg()[0], 2), cores
