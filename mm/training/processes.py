"""Several processes that train one model (`torchrun -m mm train`): who works alone, and what all agree on.

Design choices
- accelerate's state of the process is the only one; a run of one process goes the same way without communication.
- Each process has its own clock and gets its own signals. What depends on them (the end of a run, the learning rate)
  is agreed on at each step: a process that ended alone would leave the others waiting in their next exchange.
- Files are written by the first process alone; the others wait until they are whole before they read them.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather, parse_flag_from_env

# The others wait while the first process evaluates or renders: longer than torch's 10 to 30 minutes.
_WAIT = timedelta(days=1)


def processes() -> PartialState:
    """The state of this process among those of the run; the first call joins them."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_WAIT)


def in_first_process(work: Callable[[], object]) -> None:
    """Calls `work` in the first process; the others go on when it is done."""
    state = processes()
    if state.is_main_process:
        work()
    state.wait_for_everyone()


def agreed(seconds: float, stop: bool) -> tuple[float, bool]:
    """The longest of the processes' `seconds`, and whether one of them asks to stop; the same in each."""
    state = processes()
    if state.num_processes == 1:
        return seconds, stop
    all_P2 = gather(torch.tensor([[seconds, float(stop)]], device=state.device))
    longest, stopped = all_P2.amax(0).tolist()
    return longest, bool(stopped)
