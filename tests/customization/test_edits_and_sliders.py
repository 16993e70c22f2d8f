"""Adapters that edit, and sliders: tiny pipelines of the real editing and drawing classes, and mm-tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latent_grids import grid_of
from PIL import Image
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, draw_with, source_picture, tiny_pipeline_of
from typer.testing import CliRunner

from mm.core.errors import UserError
from mm.customization.customize import customize
from mm.customization.data import to_tensor
from mm.customization.objectives.protocol import objective_of
from mm.customization.sliders import SliderPrompts, shared_words

FAST: dict[str, Any] = {
    "steps": 16, "batch_size": 2, "size": SIDE, "preview_every": 16, "preserved": (), "learning_rate": 2e-2, "rank": 4,
}  # fmt: skip
EDITS = ("flux-kontext", "qwen-image-edit", "flux-2", "flux-2-klein")


def _side(name: str) -> int:
    """Of sources: FLUX.2 takes no smaller ones."""
    return 64 if name.startswith("flux-2") else SIDE


def _edited(name: str, pipe: Any, **more: Any) -> torch.Tensor:
    """A source picture, edited."""
    side = _side(name)
    source = source_picture().resize((side, side))
    return draw_with(name, pipe, image=source, height=side, width=side, **more)


def pairs(folder: Path, count: int = 2, side: int = SIDE) -> Path:
    """Pairs whose second picture is the first with its channels turned round."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        before = source_picture(number).resize((side, side))
        before.save(folder / f"{number}_before.png")
        Image.merge("RGB", before.split()[::-1]).save(folder / f"{number}_after.png")
    return folder


def _state(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("name", EDITS)
def test_the_prediction_is_that_of_editing(name: str) -> None:
    """The first step of the pipeline's own loop, with its source, is compared with `predict`."""
    pipe = tiny_pipeline_of(name)
    seen: dict[str, Any] = {}
    before = pipe.scheduler.step

    def step(output: torch.Tensor, timestep: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.setdefault("first", (output.clone(), timestep, latents.clone()))
        return before(output, timestep, latents, *args, **kwargs)

    pipe.scheduler.step = step
    more = {"true_cfg_scale": 1.0} if name == "qwen-image-edit" else {"guidance_scale": 1.0}
    _edited(name, pipe, **more)
    side = _side(name)
    objective = objective_of(pipe, side, edit=True)
    source = to_tensor(source_picture().resize((side, side)), side)[None]
    output, timestep, packed = seen["first"]
    latents, output = (grid_of(name, x, side) for x in (packed, output))
    with torch.no_grad():
        condition = objective.encode_edits(["a red fox"], source, objective.encode_pictures(source))
        made = objective.predict(latents, torch.as_tensor(timestep).float().reshape(1) / 1000, condition)
    assert float((made - output).abs().max()) < 2e-3 * float(output.abs().max())


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_learned_and_diffusers_draws_the_same(name: str, tmp_path: Path) -> None:
    """The error falls, the model is untouched, and the file in plain diffusers edits as mm does."""
    pipe, folder = tiny_pipeline_of(name), pairs(tmp_path / "data", side=_side(name))
    before = _state(pipe)
    learned = customize(pipe, folder, name="swap colours", kind="edit", **(FAST | {"size": _side(name)}))
    after = _state(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert learned.report["error"] < 0.98
    assert set(learned.entries) <= {key.removesuffix(".weight") for key in before}
    file = tmp_path / "edit.safetensors"
    learned.write(file)
    plain = _edited(name, pipe, prompt="swap colours")
    learned.apply(pipe)
    ours = _edited(name, pipe, prompt="swap colours")
    learned.undo(pipe)
    assert not torch.allclose(plain, ours, atol=1e-3)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert torch.allclose(ours, _edited(name, pipe, prompt="swap colours"), atol=2e-3)


def test_kontext_learns_a_subject_without_a_source(tmp_path: Path) -> None:
    pipe, folder = tiny_pipeline_of("flux-kontext"), subject_folder(tmp_path / "data")
    assert customize(pipe, folder, name="sks thing", **FAST).report["error"] < 0.98
    with pytest.raises(UserError, match="learns kind='edit' alone"):
        customize(tiny_pipeline_of("qwen-image-edit"), folder, name="sks thing", **FAST)


def test_our_model_learns_an_edit(tmp_path: Path) -> None:
    """Through the editing pipeline's own source; instructions that stay are of the world."""
    import mm

    pipe = mm.ImageEditPipeline.from_pretrained("mm-tiny")
    folder = pairs(tmp_path / "data", side=128)
    before = _state(pipe)
    settings = FAST | {"steps": 3, "preview_every": 3, "size": 128, "learning_rate": 2e-3, "preserved": None}
    learned = customize(pipe, folder, name="<swap>", kind="edit", work=tmp_path / "work", sample_steps=2, **settings)
    assert all(torch.equal(tensor, before[key]) for key, tensor in _state(pipe).items())
    assert learned.report["best_step"] == 3
    assert (tmp_path / "work" / "samples" / "000003.png").is_file()
    with pytest.raises(UserError, match="TextToImagePipeline takes no source picture"):
        customize(mm.TextToImagePipeline.from_pretrained("mm-tiny"), folder, name="<swap>", kind="edit", **settings)


PROMPTS = SliderPrompts(positive="a red fox", negative="a blue fox")


def _velocity(name: str, pipe: Any, prompt: str) -> torch.Tensor:
    objective = objective_of(pipe, SIDE)
    noise = torch.randn(1, *objective.encode_pictures(torch.zeros(1, 3, SIDE, SIDE)).shape[1:],
                        generator=torch.Generator().manual_seed(3))  # fmt: skip
    level = objective.fixed_levels(8)[5:6]
    with torch.no_grad():
        return objective.predict(noise, level, objective.encode_prompts([prompt]))


@pytest.mark.parametrize("name", ["stable-diffusion"])
def test_a_slider_moves_to_both_sides(name: str, tmp_path: Path) -> None:
    """At scale 1 the prediction moves along (positive - negative), at -1 against it; plain diffusers loads the file."""
    pipe = tiny_pipeline_of(name)
    before = _state(pipe)
    settings = FAST | {"steps": 24, "preview_every": 24, "slider_pictures": 2, "learning_rate": 2e-3}
    learned = customize(pipe, kind="slider", name="colour", prompts=PROMPTS, sample_steps=1, **settings)
    assert all(torch.equal(tensor, before[key]) for key, tensor in _state(pipe).items())
    assert learned.report["error"] < 0.9
    assert {entry.kind for entry in learned.entries.values()} == {"lowrank"}
    middle = _velocity(name, pipe, "a fox")
    wanted = _velocity(name, pipe, "a red fox") - _velocity(name, pipe, "a blue fox")
    moved = {}
    for scale in (1.0, -1.0):
        learned.apply(pipe, scale)
        moved[scale] = _velocity(name, pipe, "a fox") - middle
        learned.undo(pipe)
    for scale, change in moved.items():
        assert scale * float(torch.cosine_similarity(change.flatten(), wanted.flatten(), 0)) > 0.3
    file = tmp_path / "colour.safetensors"
    learned.write(file)
    learned.apply(pipe)
    ours = draw_with(name, pipe, prompt="a fox")
    learned.undo(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert torch.allclose(ours, draw_with(name, pipe, prompt="a fox"), atol=2e-3)


def test_prompts_of_a_slider() -> None:
    assert PROMPTS.middle == "a fox"
    assert shared_words("a big brown dog", "a brown small dog") == "a brown dog"
    several = SliderPrompts(positive="a red {}", negative="a blue {}", subjects=("cat", "car"))
    assert several.triples() == [("a cat", "a red cat", "a blue cat"), ("a car", "a red car", "a blue car")]
    for given, message in (
        ({"positive": "", "negative": "a"}, "the positive prompt is empty"),
        ({"positive": "a cat", "negative": "a  cat"}, "needs two that differ"),
        ({"positive": "red", "negative": "blue"}, "share no word"),
        ({"positive": "a red {}", "negative": "a blue {}"}, "there are no subjects for it"),
        ({"positive": "a red {}", "negative": "a blue one", "subjects": ("cat",)}, "the negative prompt"),
        ({"positive": "a red {}", "negative": "a blue {}", "subjects": (" ",)}, "a subject is empty"),
        ({"positive": "a b", "negative": "a c", "strength": 0.0}, "strength is 0.0"),
    ):
        with pytest.raises(UserError, match=message):
            SliderPrompts(**given)


def test_sliders_that_do_not_fit(tmp_path: Path) -> None:
    from mm.cli import app

    pipe = tiny_pipeline_of("stable-diffusion")
    settings = FAST | {"steps": 1, "preview_every": 1, "slider_pictures": 1, "sample_steps": 1}
    for method in ("textual-inversion", "dora"):
        given = {k: v for k, v in settings.items() if k != "rank"} if method == "textual-inversion" else settings
        with pytest.raises(UserError, match="a slider is scaled to both sides of zero"):
            customize(pipe, kind="slider", prompts=PROMPTS, method=method, **given)
    with pytest.raises(UserError, match="a slider is made of two prompts"):
        customize(pipe, kind="slider", **settings)
    with pytest.raises(UserError, match="give kind='slider'"):
        customize(pipe, subject_folder(tmp_path / "data"), name="sks", prompts=PROMPTS, **settings)
    for words, message in (
        (["--kind", "slider"], "a slider is made of two prompts"),
        (["--kind", "edit", "--name", "<x>"], "the kind edit is learned from pictures"),
        (["--positive", "a cat"], "the negative prompt is empty"),
        (["--kind", "slider", "--positive", "red", "--negative", "blue"], "share no word"),
    ):
        done = CliRunner().invoke(app, ["customize", *words, "-o", str(tmp_path / "x.safetensors")])
        assert done.exit_code == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
