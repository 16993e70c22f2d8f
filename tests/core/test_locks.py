"""One process at a time at a place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm.core.errors import UserError
from mm.core.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from mm.core.locks import locked
with locked(Path(sys.argv[1]), refusal="busy"):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


@pytest.mark.skipif(os.name != "posix", reason="no flock")
def test_a_second_process_is_refused_or_waits(tmp_path: Path) -> None:
    path = tmp_path / "sub" / ".running"
    with _holder(path, 1.0):
        with pytest.raises(UserError, match="busy here"), locked(path, refusal="busy here"):
            pass
        said: list[int] = []
        started = time.monotonic()
        with locked(path, waiting=lambda: said.append(1)):
            assert time.monotonic() - started > 0.2
            assert path.exists()
        assert said == [1]
    assert not path.exists()


@pytest.mark.skipif(os.name != "posix", reason="no flock")
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / ".running"
    with _holder(path, 60) as process:
        process.kill()
        process.wait()
        with locked(path, refusal="busy"):
            pass
