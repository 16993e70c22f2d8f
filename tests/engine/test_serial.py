"""The lock of a model: runs that wait come in order, and a cancelled one leaves."""

from __future__ import annotations

import threading
import time

import pytest

from mm.engine.events import CancelToken, RunCancelledError
from mm.engine.serial import FairLock


def test_waiting_runs_come_in_order():
    lock, order = FairLock(), []
    with lock:
        threads = [threading.Thread(target=_take, args=(lock, order, k)) for k in range(5)]
        for k, thread in enumerate(threads):
            thread.start()
            while len(lock._waiting) <= k:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(5))


def test_a_run_that_waits_is_cancelled_at_once_and_leaves_the_queue():
    lock, token = FairLock(), CancelToken()
    with lock:
        threading.Timer(0.1, token.cancel).start()
        with pytest.raises(RunCancelledError), lock.turn(token):
            pass
        assert not lock._waiting
    with lock.turn(CancelToken()):
        assert lock._taken
    assert not lock._taken


def _take(lock: FairLock, order: list, k: int) -> None:
    with lock:
        order.append(k)
