"""Batches and shards that other processes make are those of the training process."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from functools import partial
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_reader

from mm.training.edit_pairs import EditCache, write_edit_shard
from mm.training.joint_losses import JointConfig
from mm.training.joint_stage import JointBatches
from mm.training.latents import LatentCache, write_shard
from mm.training.trainer import TrainerConfig
from mm.training.workers import batches_from, write_all


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of each kind, written by two processes."""
    folder, autoencoder = tmp_path_factory.mktemp("shards"), tiny_reader()["autoencoder"]
    for name, write in (("latents", write_shard), ("edits", write_edit_shard)):
        write_all(partial(write, folder / name, size=8), 2, autoencoder, device="cpu", workers=2)
    return folder, autoencoder


def test_shards_are_those_of_one_process(shards, tmp_path):
    folder, autoencoder = shards
    write_all(partial(write_shard, tmp_path, size=8), 2, autoencoder, device="cpu")
    for name in ("00000", "00001"):
        once, here = (load_file(place / f"{name}.safetensors") for place in (folder / "latents", tmp_path))
        torch.testing.assert_close(once["latents"], here["latents"], atol=2e-3, rtol=1e-3)  # fp16, other thread counts
        lines = [(place / f"{name}.jsonl").read_text() for place in (folder / "latents", tmp_path)]
        assert lines[0] == lines[1]


def test_batches_come_in_order_and_bit_for_bit_from_any_step(shards):
    folder, _ = shards
    batches = JointBatches(LatentCache(folder / "latents"), EditCache(folder / "edits"), JointConfig(), 4, seed=0)
    here, there = (list(islice(batches_from(batches, 5, workers=n), 12)) for n in (0, 3))
    kinds = {type(batch).__name__ for batch in here}
    assert kinds == {"DrawingBatch", "ReadBatch", "EditBatch"}
    for one, other in zip(here, there, strict=True):
        assert type(one) is type(other)
        for name in ("ids_BT", "mask_BT"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(here[-1].ids_BT, batches(16).ids_BT)


def test_an_error_of_a_batch_reaches_the_run():
    def broken(step: int, process: int) -> torch.Tensor:
        if step == 2:
            raise ValueError("no scenes left")
        return torch.full((1,), random.random())

    made = batches_from(broken, 0, workers=2)
    next(made), next(made)
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match="no scenes left"):
        next(made)
    assert len(before) == 2 and not multiprocessing.active_children()


def test_sigterm_to_all_processes_ends_the_run_and_keeps_its_state(tmp_path):
    """As a cluster's scheduler stops a job: every process gets the signal."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from mm.training.trainer import Trainer, TrainerConfig\n"
        "class Line(torch.nn.Linear):\n"
        "    def forward(self, x): return {'square': super().forward(x).square().mean()}\n"
        "def batch(step, process):\n"
        "    if step == 5: print('running', flush=True)\n"
        "    return torch.ones(2, 4)\n"
        "Trainer(Line(4, 1), Path(sys.argv[1]), TrainerConfig(minutes=5, workers=2)).run(batch)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "out")]
    run = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and any("running" in line for line in run.stdout)
    os.killpg(run.pid, signal.SIGTERM)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert (tmp_path / "out/state.safetensors").is_file()


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(ValueError, match="workers -1"):
        TrainerConfig(workers=-1)
