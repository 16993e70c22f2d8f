"""The trainer and the stages around it: resuming to the bit, several processes, previews, publishing."""

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
from damaged import damaged_states
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save
from tiny import tiny_reader
from torch import nn

from mm.core.errors import UserError
from mm.training import publishing, run
from mm.training.edit_pairs import EditCache, write_edit_shard
from mm.training.latents import LatentCache, write_shard
from mm.training.trainer import Trainer, TrainerConfig, rate_factor

STEADY = TrainerConfig(minutes=1, batch_size=4, decay_share=0.0, warmup=2)


class Line(nn.Module):
    """The smallest module to train, with a matrix for Muon and a vector for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.readout = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"square": (self.readout(self.inner(batch)) - batch.sum(-1, keepdim=True)).square().mean()}


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.train_step(batch(trainer.step))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    whole = Trainer(Line(), tmp_path / "whole", STEADY)
    advance(whole, 7)
    first = Trainer(Line(), tmp_path / "parts", STEADY)
    advance(first, 3)
    first.save()
    second = Trainer(Line(), tmp_path / "parts", STEADY)
    assert second.step == 3
    advance(second, 4)
    assert second.samples == whole.samples == 28
    once, twice = dict(whole.tensors()), dict(second.tensors())
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_damaged_state_is_one_error_that_says_what_to_do(tmp_path):
    trainer = Trainer(Line(), tmp_path, STEADY)
    advance(trainer, 2)
    trainer.save()
    state = tmp_path / "state.safetensors"
    whole = state.read_bytes()
    for done, data in damaged_states(state):
        if done in ("without tensors", "without warm_from"):  # as earlier versions wrote it
            continue
        state.write_bytes(data)
        with pytest.raises(UserError) as caught:
            Trainer(Line(), tmp_path, STEADY)
        assert str(caught.value).startswith(str(state)), (done, str(caught.value))
        assert f"delete {state}, and the stage begins again" in str(caught.value), done
        assert state.read_bytes() == data
    state.write_bytes(whole)
    assert Trainer(Line(), tmp_path, STEADY).step == 2


@pytest.mark.parametrize("cache", [LatentCache, EditCache])
def test_a_damaged_shard_is_one_error_that_says_what_to_do(tmp_path, cache):
    write = write_shard if cache is LatentCache else write_edit_shard
    write(tmp_path, 0, tiny_reader()["autoencoder"], size=3)
    tensors, lines = tmp_path / "00000.safetensors", tmp_path / "00000.jsonl"
    kept = {file: file.read_bytes() for file in (tensors, lines)}
    found = load(kept[tensors])
    first = kept[lines].splitlines()[0] + b"\n"
    wrong = [(tensors, data) for data in (b"", kept[tensors][:99], b"{}", save({"x": torch.zeros(3)}))]
    wrong += [(tensors, save({name: tensor[:2].clone() for name, tensor in found.items()}))]
    wrong += [(lines, data) for data in (b"", first, b"[]\n" * 3, b"{}\n" * 3, b"\xff\n", b"null\n" * 3)]
    for file, data in wrong:
        file.write_bytes(data)
        with pytest.raises(UserError, match=f"00000.*; delete {tensors}, and the shard is made again"):
            cache(tmp_path)
        file.write_bytes(kept[file])
    lines.unlink()
    with pytest.raises(UserError, match=r"no list of a shard at .*; delete .*, and the shard is made again"):
        cache(tmp_path)


def test_the_average_follows_the_weights_and_is_swapped_in_and_out(tmp_path):
    trainer = Trainer(Line(), tmp_path, STEADY)
    advance(trainer, 5)
    now = trainer.bare.inner.weight.detach().clone()
    average = trainer.average.tensors["inner.weight"].clone()
    assert not torch.equal(now, average)
    with trainer.averaged():
        assert torch.equal(trainer.bare.inner.weight, average)
    assert torch.equal(trainer.bare.inner.weight, now)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = Trainer(Line(), tmp_path, STEADY)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        trainer.train_step(torch.full((4, 8), float("nan")))


def test_rates_rise_stay_and_fall() -> None:
    linear = TrainerConfig(minutes=10, warmup=4, decay_share=0.5)
    assert [rate_factor(linear, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [rate_factor(linear, 9, 60.0 * m) for m in (5, 7.5, 10, 20)] == [1.0, 0.5, 0.01, 0.01]
    cosine = TrainerConfig(minutes=10, warmup=1, schedule="cosine", floor=0.2)
    assert [rate_factor(cosine, 9, 60.0 * m) for m in (0, 5, 10)] == pytest.approx([1.0, 0.6, 0.2])


def test_statistics_of_batch_norms_are_averaged_and_other_buffers_are_not(tmp_path) -> None:
    class Normed(Line):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("table", torch.zeros(2))

        def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return super().forward(self.norm(batch))

    trainer = Trainer(Normed(), tmp_path, STEADY)
    trainer.module.train()
    advance(trainer, 3)
    live = trainer.bare.norm.running_mean.clone()
    with trainer.averaged():
        assert not torch.equal(trainer.bare.norm.running_mean, live)
    assert torch.equal(trainer.bare.norm.running_mean, live)
    assert "table" not in trainer.average.tensors


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
    config["drawing"]["trainer"] |= {"batch_size": 4, "minutes": 0.03}
    config["drawing"]["stage"] |= {"align_layer": 1, "codes_share": 0.5}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder / "tiny.yaml", state


def test_a_stage_runs_is_previewed_and_published_and_resumes(tiny_run):
    config, state = tiny_run
    run.run_stages(str(config), stages=["drawing"], state=state)
    rows = [json.loads(line) for line in (state / "drawing" / "log.jsonl").read_text().splitlines()]
    assert {"compose", "compose_codes"} <= set(rows[-1])
    assert Image.open(state / "drawing" / "preview-flow.png").width > 200
    before = rows[-1]["step"]
    run.run_stages(str(config), stages=["drawing"], state=state, minutes=(rows[-1]["seconds"] + 2) / 60)
    rows = [json.loads(line) for line in (state / "drawing" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] > before > 0
    for name in ("trunk", "velocity_decoder", "code_head"):
        assert (state / "model" / name / "config.json").is_file()


def test_a_part_is_published_over_an_earlier_one_in_one_file_or_several(tmp_path, monkeypatch):
    """diffusers keeps the index of several files beside the one file that replaces them, and then finds neither."""
    parts = tiny_reader()
    for size in ("12MB", "20KB", "12MB"):
        monkeypatch.setattr(publishing, "_LARGEST", size)
        publishing.publish(parts["trunk"], tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1 if size == "20KB" else True
        again = type(parts["trunk"]).from_pretrained(tmp_path)
        for name, tensor in parts["trunk"].state_dict().items():
            assert torch.equal(again.state_dict()[name].bfloat16(), tensor.bfloat16())
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]


def test_two_processes_share_the_work_and_keep_one_log_and_state(tiny_run, tmp_path):
    """As docs/training.md launches several devices, on two CPU processes."""
    config, state = tiny_run
    (tmp_path / "model").symlink_to(state / "model")
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
    assert list((tmp_path / "latents").glob("*.safetensors"))


def test_unknown_stages_and_configs_are_named(tiny_run):
    config, state = tiny_run
    with pytest.raises(UserError, match="unknown stage 'paint'"):
        run.run_stages(str(config), stages=["paint"], state=state)
    with pytest.raises(UserError, match=r"no training config 'mm-huge'; known: mm-tiny"):
        run.read_config("mm-huge")


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "holds a list; a training config is a mapping"), ("a: [\n", "is no YAML"), ("", "holds a NoneType")],
)
def test_a_config_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        run.read_config(str(tmp_path / "x.yaml"))
