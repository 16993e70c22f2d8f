"""OpenMP's threads end with a turn, so that another thread's computing does not share the cores with idle ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_RUNS = """
import os, sys, threading, time
sys.path.insert(0, {tests!r})
import torch
from mm.core.threads import release_team

def threads():
    return len(os.listdir("/proc/self/task"))

def settled(wanted):
    end = time.monotonic() + 20
    while threads() > wanted and time.monotonic() < end:
        time.sleep(0.01)  # an ended thread leaves the list a moment later
    return threads()

alone, wanted = threads(), 1e6 * torch.e
x = torch.ones(1000, 1000).exp().log()
team = threads()
assert team == alone + 1, "torch computes without OpenMP's threads here"
assert release_team() and settled(alone) == alone
assert torch.isclose(x.exp().sum(), torch.tensor(wanted)) and threads() == team  # a new team

import mm
from tiny import tiny_pipeline
from mm.engine.requests import Draw
tiny_pipeline().save_pretrained({folder!r})
engine = mm.load({folder!r})
request = Draw(prompt="a cat", seed=1, steps=1)
engine.draw("a cat", seed=1, steps=1), list(engine.run(request))  # libraries begin threads of their own
x.exp()
team = threads()
engine.draw("a cat", seed=1, steps=1)
assert settled(team - 1) <= team - 1, "a run in this thread leaves OpenMP's threads"
x.exp()
list(engine.run(request))
assert settled(team - 1) <= team - 1, "a run in a thread leaves those of its caller"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is torch's on Linux")
def test_a_run_leaves_no_team_of_threads(tmp_path: Path) -> None:
    """At the end of each turn the process has as many threads as before, whichever thread drew."""
    values = {"tests": str(Path(__file__).parents[1]), "folder": str(tmp_path)}
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", _RUNS.format(**values)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
