"""`mm.customize` on tiny pipelines of the real classes: what is learned, what stays, files, and stopped runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from damaged import damaged_states
from forked import Forks
from safetensors import safe_open
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, draw_with, tiny_pipeline_of
from typer.testing import CliRunner

from mm.adapters.formats import read_lora
from mm.adapters.patch import Patch
from mm.cli import app
from mm.core import run_files
from mm.core.errors import UserError
from mm.customization.customize import customize
from mm.customization.run_state import STATE

FAMILIES = (
    "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "qwen-image", "sana", "z-image", "flux-2",
    "flux-2-klein", "chroma", "lumina-2", "pixart-sigma", "aura-flow", "cogview-4", "wan",
    "hunyuan-image", "bria", "hunyuan-dit", "flux-fill", "sana-sprint",
)  # fmt: skip
OTHERS = (
    ("stable-diffusion-3", "eva"), ("stable-diffusion", "paca"), ("flux", "s2ft"), ("qwen-image", "adalora"),
)  # fmt: skip
FAST: dict[str, Any] = {
    "steps": 12, "batch_size": 2, "size": SIDE, "preview_every": 6, "preserve_batch": 2, "learning_rate": 2e-2,
    "preserved": (), "rank": 4,
}  # fmt: skip


def _state(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize(("name", "method"), [*((name, "dreambooth") for name in FAMILIES), *OTHERS])
def test_a_family_learns_and_diffusers_draws_the_same(name: str, method: str, tmp_path: Path) -> None:
    """The error falls, the model is untouched, and the file in plain diffusers gives mm's picture."""
    pipe, folder = tiny_pipeline_of(name), subject_folder(tmp_path / "data")
    before = _state(pipe)
    learned = customize(pipe, folder, name="sks thing", method=method, **FAST)
    after = _state(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert learned.report["error"] < (0.998 if method == "adalora" else 0.98)  # whose directions begin at zero
    assert set(learned.entries) <= {key.removesuffix(".weight") for key in before}

    file = tmp_path / "learned.safetensors"
    learned.write(file)
    plain = draw_with(name, pipe, prompt="sks thing")
    learned.apply(pipe)
    ours = draw_with(name, pipe, prompt="sks thing")
    learned.undo(pipe)
    assert not torch.allclose(plain, ours, atol=1e-3)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
        theirs = draw_with(name, pipe, prompt="sks thing")
        assert torch.allclose(ours, theirs, atol=2e-3)
    again = tiny_pipeline_of(name)
    read_lora(file, again).apply(again)
    assert torch.allclose(ours, draw_with(name, again, prompt="sks thing"), atol=1e-4)
    with safe_open(file, "pt") as read:
        meta = read.metadata()
    assert meta["modelspec.trigger_phrase"] == "sks thing"
    if method != "dreambooth":  # ranks of their own for each layer
        return
    assert meta["ss_network_dim"] == "4"
    assert any(key.endswith(".r") for key in json.loads(meta["lora_adapter_metadata"]))


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
    state, before = work / STATE, _state(pipe)
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
        assert all(torch.equal(value, before[name]) for name, value in _state(pipe).items()), done
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


def test_a_run_without_progress_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    """At a rate that destroys, the first previews are the best, and their values are kept."""
    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    wild = FAST | {"steps": 100, "preview_every": 2, "patience": 2, "learning_rate": 10.0, "preserve": 0.0}
    learned = customize(pipe, folder, name="sks thing", **wild)
    assert learned.report["stopped_early"]
    assert learned.report["steps"] < 100
    assert learned.report["best_step"] < learned.report["steps"] - 3


def test_preservation_holds_unrelated_prompts_to_the_base(tmp_path: Path) -> None:
    """With it the drift is smaller than without, at the same steps and rate."""
    folder = subject_folder(tmp_path / "data")
    drifts = []
    for weight in (0.0, 10.0):
        pipe = tiny_pipeline_of("stable-diffusion")
        same = FAST | {"steps": 30, "preview_every": 30, "preserved": ("a dog", "a red fox", ""), "preserve": weight}
        run = customize(pipe, folder, name="sks thing", **same, patience=100)
        drifts.append(run.report["last_drift"])
    assert 0 < drifts[1] < 0.6 * drifts[0]


def test_a_guard_halves_the_drift_of_what_it_names(tmp_path: Path) -> None:
    """Measured without weight, and with: prompts for the guarded concept stay nearer to the base."""
    folder = subject_folder(tmp_path / "data")
    drifts = []
    for weight in (0.0, 10.0):
        pipe = tiny_pipeline_of("stable-diffusion")
        same = FAST | {"steps": 30, "preview_every": 30, "guard_weight": weight, "guard_batch": 2}
        run = customize(pipe, folder, name="sks thing", guard=("wolf",), **same, patience=100)
        drifts.append(run.report["guard_drift"])
    assert 0 < drifts[1] < 0.5 * drifts[0]
    with pytest.raises(UserError, match="a guarded concept is empty"):
        customize(pipe, folder, name="sks thing", guard=(" ",), **FAST)


def test_regularization_pictures_are_learned_beside(tmp_path: Path) -> None:
    """Their error falls more than without them; what cannot be is refused."""
    from mm.customization.data import read_regularization
    from mm.customization.training import Regularization, Training

    folder, others = subject_folder(tmp_path / "data"), subject_folder(tmp_path / "class" / "2_fox", captions=False)
    assert others.is_dir()
    examples = read_regularization(tmp_path / "class", noun="fox")
    assert [(e.caption, e.repeats) for e in examples] == [("a photo of a fox", 2)] * 3
    errors: list[float] = []
    real = Training.save

    def measured(self: Training) -> None:
        if self.progress.step == 12 and self.regularization is not None:
            with torch.no_grad():
                errors.append(sum(float(self.regularization.loss(self.objective, k)) for k in range(100, 108)))
        real(self)

    Training.save = measured  # type: ignore[method-assign]
    try:
        for weight in (0.0, 1.0):
            pipe = tiny_pipeline_of("stable-diffusion")
            more = {"regularize": weight, "noun": "fox", "regularization": tmp_path / "class"}
            learned = customize(pipe, folder, name="sks", **FAST, **more)
            assert learned.report["pictures"] == 3
    finally:
        Training.save = real  # type: ignore[method-assign]
    assert errors[1] < errors[0]
    assert Regularization.__dataclass_fields__.keys() == {"batches", "captions"}
    (tmp_path / "empty").mkdir()
    for given, message in (
        ({"regularization": tmp_path / "no-such"}, "is no folder"),
        ({"regularization": tmp_path / "empty", "noun": "fox"}, "holds no picture"),
        ({"regularization": tmp_path / "class"}, "no class is given"),
        ({"regularization": tmp_path / "class", "kind": "edit"}, "leave them out"),
    ):
        with pytest.raises(UserError, match=message):
            customize(pipe, folder, name="sks", **FAST, **given)  # type: ignore[arg-type]


def test_names_and_calls_that_do_not_fit(tmp_path: Path) -> None:
    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    for name in ("", " mug", "a\nb"):
        with pytest.raises(UserError, match="the name is"):
            customize(pipe, folder, name=name, **FAST)
    whole = (word.removesuffix("</w>") for word in pipe.tokenizer.get_vocab() if word.endswith("</w>"))
    word = max((w for w in whole if w.isalpha()), key=lambda w: (len(w), w))
    with pytest.warns(UserWarning, match="is a word that the model knows already"):
        customize(pipe, folder, name=word, **(FAST | {"steps": 1, "preview_every": 1}))
    with pytest.raises(UserError, match="kind is 'thing'"):
        customize(pipe, folder, name="sks", kind="thing", **FAST)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="StableDiffusionPipeline takes no source picture"):
        customize(pipe, folder, name="sks", kind="edit", **FAST)
    with pytest.raises(UserError, match="the kind subject is learned from pictures"):
        customize(pipe, name="sks", **FAST)
    with pytest.raises(UserError, match="no method 'magic'; there are auto, dreambooth"):
        customize(pipe, folder, name="sks", method="magic", **FAST)
    with pytest.raises(UserError, match="DDPMPipeline cannot be customized yet"):
        customize(
            diffusers.DDPMPipeline(
                unet=diffusers.UNet2DModel(
                    block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
                ),
                scheduler=pipe.scheduler,
            ),
            folder,
            name="sks",
            **FAST,
        )
    control = diffusers.CogView4ControlPipeline(**tiny_pipeline_of("cogview-4").components)
    with pytest.raises(UserError, match=r"CogView4ControlPipeline cannot .* family cogview-4, CogView4Pipeline can"):
        customize(control, folder, name="sks", **FAST)
    wan = tiny_pipeline_of("wan")
    wan.register_modules(transformer_2=wan.transformer)
    with pytest.raises(UserError, match=r"a transformer for high noise and one for low noise cannot be customized yet"):
        customize(wan, folder, name="sks", **FAST)
    assert not any(hasattr(m, "branches") for m in pipe.unet.modules())


def test_our_model_learns_a_new_word(tmp_path: Path) -> None:
    """The word gets a row, the file brings both, and on another pipeline the word is added and taken off."""
    import mm

    def draw(pipe: Any) -> torch.Tensor:
        seeded = torch.Generator().manual_seed(3)
        return pipe("a <mug> on grass", num_inference_steps=2, generator=seeded, output_type="pt").images

    pipe = mm.TextToImagePipeline.from_pretrained("mm-tiny")
    pipe.set_progress_bar_config(disable=True)
    before, words = _state(pipe), len(pipe.text_tokenizer)
    folder = subject_folder(tmp_path / "data", 2)
    fast = FAST | {"steps": 2, "batch_size": 1, "size": 128, "preview_every": 2, "preserve_batch": 1, "companions": 0}
    learned = customize(pipe, folder, name="<mug>", layers="text", **fast)
    after = _state(pipe)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(pipe.text_tokenizer) == words
    assert {e.kind for e in learned.entries.values()} == {"lowrank", "rows"}
    with pytest.raises(UserError, match="is a word of the model already"):
        customize(pipe, folder, name="cat", **fast)
    file = tmp_path / "mug.safetensors"
    learned.write(file)
    other = mm.TextToImagePipeline.from_pretrained("mm-tiny")
    other.set_progress_bar_config(disable=True)
    other.text_tokenizer.add_tokens(["<first>"])  # takes the row that the word had
    learned.apply(pipe)
    read = Patch.load(file)
    read.apply(other)
    assert other.text_tokenizer.convert_tokens_to_ids("<mug>") != pipe.text_tokenizer.convert_tokens_to_ids("<mug>")
    assert torch.equal(draw(pipe), draw(other))
    assert read.verify(other)
    twin = Patch.load(file)
    twin.name = "twin"
    with pytest.raises(UserError, match='brings the word "<mug>" already'):
        twin.apply(other)
    read.undo(other)
    assert all(torch.equal(before[key], tensor) for key, tensor in _state(other).items())
