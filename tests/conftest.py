"""Shared by all tests. mm comes first: its hook lets a torchvision without CUDA be imported at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test goes online, not even to ask whether a file is new
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall each other where cores are few

import pytest
from forked import Forks, Run

import mm

ROOT = Path(__file__).resolve().parents[1]
assert Path(mm.__file__).is_relative_to(ROOT), f"mm comes from {mm.__file__}, so these tests would test something else"


def run_python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, as a user has it."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def python() -> Run:
    """Runs `python ARGUMENTS` from the repository root."""
    return run_python


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs python commands in forks of a process that has imported the large libraries."""
    server = Forks(tmp_path_factory.mktemp("huggingface"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def cli(forks: Forks) -> Run:
    """Runs `mm ARGUMENTS` from the repository root, in a process of its own."""
    return partial(forks.run, "-m", "mm")
