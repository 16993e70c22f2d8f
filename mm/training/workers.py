"""Batches and shards made in other processes, so that a GPU does not wait for one CPU core.

Design choices
- Batch k depends on (seed, k) alone, so processes make batches ahead of time and the run is the same run. torch's
  DataLoader keeps their order and passes tensors in shared memory.
- A process that makes batches is forked: cached scenes are not copied. It must not touch the GPU. One that writes
  shards encodes, so it is started afresh and uses the GPU itself.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mm.training.processes import processes

_AHEAD = 4  # batches that each process prepares


class _Steps(Dataset[Any]):
    """Step -> batch, for one process of training."""

    def __init__(self, batches: Callable[[int, int], Any], process: int) -> None:
        self.batches, self.process = batches, process

    def __getitem__(self, step: int) -> Any:
        return self.batches(step, self.process)


def batches_from(
    batches: Callable[[int, int], Any], start: int, *, process: int = 0, workers: int = 0
) -> Generator[Any]:
    """The batches of steps `start`, `start` + 1, ... in order; close it to end the processes.

    Args:
        batches: Makes the batch of a step for a process of training.
        start: The first step.
        process: Number of this process of training.
        workers: Processes that make batches; 0 makes them here, when they are asked for.
    """
    if workers == 0:
        yield from (batches(step, process) for step in itertools.count(start))  # without an end
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    loader: DataLoader[Any] = DataLoader(
        _Steps(batches, process),
        batch_size=None,
        sampler=itertools.count(start),  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        prefetch_factor=_AHEAD,
        multiprocessing_context="fork",
        worker_init_fn=_leave_ending_to_the_run,
    )
    made: Any = iter(loader)
    try:
        yield from made
    finally:  # the traceback of an error keeps the iterator, and with it the processes
        made._shutdown_workers()


def _leave_ending_to_the_run(_: int) -> None:
    """A SIGTERM that reaches the whole process group ends the run after its step; the run ends the workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def write_all(
    write: Callable[[int, Any], None], count: int, autoencoder: nn.Module, *, device: str, workers: int = 0
) -> None:
    """Calls `write(k, autoencoder)` for k of 0 ... `count` - 1, in `workers` processes where that is above 1.

    Processes that train together share the shards, and go on when all are written.

    Args:
        write: Writes one shard; a function of a module, or a `functools.partial` of one.
        count: How many shards.
        autoencoder: Encodes; it is moved to `device`.
        device: Where each process encodes.
        workers: How many processes.
    """
    state = processes()
    shards = range(state.process_index, count, state.num_processes)
    if workers <= 1:
        autoencoder = autoencoder.to(device)
        for k in shards:
            write(k, autoencoder)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _begin, (autoencoder.to("cpu"), device)) as pool:
            list(pool.map(_write, [write] * len(shards), shards))
    state.wait_for_everyone()


_held: nn.Module | None = None


def _begin(autoencoder: nn.Module, device: str) -> None:
    global _held
    torch.set_num_threads(1)
    _held = autoencoder.to(device)


def _write(write: Callable[[int, Any], None], k: int) -> None:
    assert _held is not None
    write(k, _held)
