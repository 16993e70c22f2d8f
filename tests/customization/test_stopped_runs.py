"""Runs of `mm.customize` that were stopped: what goes on from where, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import damaged_states
from forked import Forks
from safetensors import safe_open
from short_runs import FAST, state_of
from subject_pictures import subject_folder
from tiny_pipelines import tiny_pipeline_of
from typer.testing import CliRunner

from mm.cli import app
from mm.core import run_files
from mm.core.errors import UserError
from mm.customization.customize import customize
from mm.customization.run_state import STATE

_RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import mm
from tiny_pipelines import tiny_pipeline_of
from mm.customization.customize import customize

replace, states = os.replace, []

def kill(source, target):  # the sixth state has been written, and has not its name yet
    states.extend([target] * str(target).endswith({state!r}))
    if len(states) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = kill
pipe = tiny_pipeline_of("stable-diffusion")
customize(pipe, {folder!r}, name="sks thing", work={work!r}, samples=(), save_every=1, **{fast!r}).write({out!r})
"""


def test_a_killed_run_gives_the_file_of_an_undisturbed_one(tmp_path: Path, forks: Forks) -> None:
    """A run is killed while it saves its sixth step; what goes on from the fifth ends in the same bytes."""
    folder = subject_folder(tmp_path / "data")
    fast = FAST | {"preview_every": 4}
    work, out = tmp_path / "work", tmp_path / "resumed.safetensors"
    script = _RUN.format(
        tests=str(Path(__file__).parents[1]), folder=str(folder), work=str(work), fast=fast, out=str(out), state=STATE
    )  # fmt: skip
    killed = forks.run("-c", script)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists() and list(work.glob(f".{STATE}.*.part"))
    with safe_open(work / STATE, "pt") as read:  # a state that is whole
        assert json.loads(read.metadata()["progress"])["step"] == 5
    settings = fast | {"name": "sks thing", "samples": (), "save_every": 1}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        customize(tiny_pipeline_of("stable-diffusion"), folder, work=work, **settings).write(out)
    undisturbed = tmp_path / "undisturbed.safetensors"
    customize(tiny_pipeline_of("stable-diffusion"), folder, **settings).write(undisturbed)
    assert out.read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_command_says_how_it_goes_on(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "cup.safetensors.work"

    def interrupted(*_: Any, **__: Any) -> None:
        if saved:
            work.mkdir()
            (work / STATE).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("mm.customization.customize.customize", interrupted)
    folder = subject_folder(tmp_path / "data")
    given = ["customize", str(folder), "--name", "<cup>", "-o", str(tmp_path / "cup.safetensors")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 130
    assert (f"stopped; the same command goes on from {work / STATE}" in done.stderr) == saved


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    folder, work = subject_folder(tmp_path / "data"), tmp_path / "work"
    pipe = tiny_pipeline_of("stable-diffusion")
    short = FAST | {"steps": 2, "preview_every": 2}
    customize(pipe, folder, name="sks thing", work=work, **short)
    assert (work / "loss.png").is_file()
    assert (work / "samples" / "000002.png").is_file()
    with pytest.raises(UserError, match="other pictures or settings"):
        customize(pipe, folder, name="sks thing", work=work, **(short | {"rank": 2}))
    with pytest.raises(UserError, match="no setting 'ranks'; it has rank"):
        customize(pipe, folder, name="sks thing", **(short | {"ranks": 2}))


@pytest.mark.parametrize("method", ["dreambooth", "adalora"])
def test_a_damaged_state_is_one_error_that_says_what_to_do(tmp_path: Path, method: str) -> None:
    folder, work = subject_folder(tmp_path / "data"), tmp_path / "work"
    pipe = tiny_pipeline_of("stable-diffusion")
    settings = FAST | {"steps": 2, "preview_every": 2, "name": "sks thing", "samples": (), "method": method}
    customize(pipe, folder, work=work, **settings)
    state, before = work / STATE, state_of(pipe)
    whole = state.read_bytes()
    for done, data in damaged_states(state):
        if method == "adalora" and "kept" not in done:  # it differs in what it keeps alone
            continue
        if done in ("without tensors", "of nothing"):  # as an earlier version wrote it; no state of a run at all
            continue
        state.write_bytes(data)
        if done.startswith("identity = "):
            with pytest.raises(UserError, match="other pictures or settings"):
                customize(pipe, folder, work=work, **settings)
            continue
        with pytest.raises(UserError) as caught:
            customize(pipe, folder, work=work, **settings)
        assert str(caught.value).startswith(str(state)), (done, str(caught.value))
        assert f"delete {state}, and the run begins again" in str(caught.value), done
        assert state.read_bytes() == data
        assert all(torch.equal(value, before[name]) for name, value in state_of(pipe).items()), done
    state.write_bytes(whole)
    assert customize(pipe, folder, work=work, **settings).report["steps"] == 2


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the last save that went through is whole, and the run goes on from it."""
    folder, work, pipe = subject_folder(tmp_path / "data"), tmp_path / "work", tiny_pipeline_of("stable-diffusion")
    settings = FAST | {"steps": 4, "preview_every": 4, "save_every": 1, "samples": ()}
    real, saves = run_files.write_bytes, []

    def full(path: Path, data: bytes) -> None:
        saves.append(path)
        if len(saves) == 3:
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(run_files, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        customize(pipe, folder, name="sks thing", work=work, **settings)
    with safe_open(work / STATE, "pt") as read:
        assert json.loads(read.metadata()["progress"])["step"] == 2
    resumed = customize(pipe, folder, name="sks thing", work=work, **settings)
    plain = customize(pipe, folder, name="sks thing", **settings)
    assert all(torch.equal(e.tensors["up"], resumed.entries[k].tensors["up"]) for k, e in plain.entries.items())
