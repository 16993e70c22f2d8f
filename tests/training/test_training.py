"""The training loop and the stages around it: resuming to the bit, several processes, previews, publishing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from tiny import tiny_reader
from torch import nn

from mm.core.errors import UserError
from mm.training import run
from mm.training.latents import write_shard
from mm.training.loop import Loop, LoopConfig

STEADY = LoopConfig(minutes=1, batch_size=4, decay_share=0.0, warmup=2)


class Line(nn.Module):
    """The least that the loop can train, with a matrix for Muon and a vector for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.readout = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"square": (self.readout(self.inner(batch)) - batch.sum(-1, keepdim=True)).square().mean()}


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def advance(loop: Loop, steps: int) -> None:
    for _ in range(steps):
        loop._train_step(batch(loop.step))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    whole = Loop(Line(), tmp_path / "whole", STEADY)
    advance(whole, 7)
    first = Loop(Line(), tmp_path / "parts", STEADY)
    advance(first, 3)
    first.save()
    second = Loop(Line(), tmp_path / "parts", STEADY)
    assert second.step == 3
    advance(second, 4)
    assert second.samples == whole.samples == 28
    once, twice = dict(whole._tensors()), dict(second._tensors())
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_the_average_follows_the_weights_and_is_swapped_in_and_out(tmp_path):
    loop = Loop(Line(), tmp_path, STEADY)
    advance(loop, 5)
    now = loop.bare.inner.weight.detach().clone()
    average = loop.average["inner.weight"].clone()
    assert not torch.equal(now, average)
    with loop.averaged():
        assert torch.equal(loop.bare.inner.weight, average)
    assert torch.equal(loop.bare.inner.weight, now)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    loop = Loop(Line(), tmp_path, STEADY)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        loop._train_step(torch.full((4, 8), float("nan")))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[Path, Path]:
    """A YAML of a tiny model, and a state folder with its tokenizer and a shard of latents."""
    folder, parts = tmp_path_factory.mktemp("tiny"), tiny_reader()
    state = folder / "state"
    parts["autoencoder"].save_pretrained(state / "model" / "autoencoder")
    parts["bridge"].save_pretrained(state / "model" / "bridge")
    write_shard(state / "latents", 0, parts["autoencoder"], size=32)
    small = {k: parts["trunk"].config[k] for k in ("vocabulary_size", "width", "depth", "heads")}
    config: dict[str, Any] = yaml.safe_load((Path(run.__file__).parent / "mm-tiny.yaml").read_text())
    config["models"] = {
        "trunk": small,
        "velocity_decoder": {"feature_width": small["width"], "width": 32, "depth": 1, "heads": 2},
        "code_head": {"feature_width": small["width"], "width": 32, "depth": 1, "heads": 2},
    }
    config["drawing"]["loop"] |= {"batch_size": 4, "minutes": 0.03}
    config["drawing"]["stage"] |= {"align_layer": 1, "codes_share": 0.5}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder / "tiny.yaml", state


def test_a_stage_runs_is_judged_and_published_and_goes_on(tiny_run):
    config, state = tiny_run
    run.run_stages(str(config), stages=["drawing"], state=state)
    rows = [json.loads(line) for line in (state / "drawing" / "log.jsonl").read_text().splitlines()]
    assert {"compose", "compose_codes"} <= set(rows[-1])
    assert Image.open(state / "drawing" / "preview-flow.png").width > 200
    before = rows[-1]["step"]
    run.run_stages(str(config), stages=["drawing"], state=state, minutes=0.06)
    rows = [json.loads(line) for line in (state / "drawing" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] > before > 0
    for name in ("trunk", "velocity_decoder", "code_head"):
        assert (state / "model" / name / "config.json").is_file()


def test_two_processes_share_the_work_and_keep_one_log_and_state(tiny_run, tmp_path):
    """As docs/training.md launches several devices, on two CPU processes."""
    config, state = tiny_run
    for name in ("model", "latents"):
        (tmp_path / name).symlink_to(state / name)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "mm", "train", str(config)]
    where = ["--state", str(tmp_path), "--publish", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, "--stage", "drawing", "--minutes", "0.03", *where]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with safe_open(tmp_path / "drawing" / "state.safetensors", "pt") as file:
        counters = file.metadata()
    assert int(counters["step"]) > 0
    assert int(counters["samples"]) == 2 * 4 * int(counters["step"])
    assert (tmp_path / "out" / "trunk" / "config.json").is_file()


def test_unknown_stages_and_configs_are_named(tiny_run):
    config, state = tiny_run
    with pytest.raises(UserError, match="unknown stage 'paint'"):
        run.run_stages(str(config), stages=["paint"], state=state)
    with pytest.raises(UserError, match=r"no training config 'mm-huge'; known: mm-tiny"):
        run.read_config("mm-huge")
