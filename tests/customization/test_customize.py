"""`mm.customize` on tiny pipelines of the real classes: what is learned, what stays, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from short_runs import FAST, state_of
from subject_pictures import subject_folder
from tiny_pipelines import draw_with, tiny_pipeline_of

from mm.adapters.formats import read_lora
from mm.adapters.patch import Patch
from mm.core.errors import UserError
from mm.customization.customize import customize

FAMILIES = (
    "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "qwen-image", "sana", "z-image", "flux-2",
    "flux-2-klein", "chroma", "lumina-2", "pixart-sigma", "aura-flow", "cogview-4", "wan",
    "hunyuan-image", "bria", "hunyuan-dit", "flux-fill", "sana-sprint",
)  # fmt: skip
OTHERS = (
    ("stable-diffusion-3", "eva"), ("stable-diffusion", "paca"), ("flux", "s2ft"), ("qwen-image", "adalora"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "method"), [*((name, "dreambooth") for name in FAMILIES), *OTHERS])
def test_a_family_learns_and_diffusers_draws_the_same(name: str, method: str, tmp_path: Path) -> None:
    """The error falls, the model is untouched, and the file in plain diffusers gives mm's picture."""
    pipe, folder = tiny_pipeline_of(name), subject_folder(tmp_path / "data")
    before = state_of(pipe)
    learned = customize(pipe, folder, name="sks thing", method=method, **FAST)
    after = state_of(pipe)
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
    before, words = state_of(pipe), len(pipe.text_tokenizer)
    folder = subject_folder(tmp_path / "data", 2)
    fast = FAST | {"steps": 2, "batch_size": 1, "size": 128, "preview_every": 2, "preserve_batch": 1, "companions": 0}
    learned = customize(pipe, folder, name="<mug>", layers="text", **fast)
    after = state_of(pipe)
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
    assert all(torch.equal(before[key], tensor) for key, tensor in state_of(other).items())
