"""Pipelines of families without an objective: what is read off their calls is what other objectives write down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, draw_with, tiny_pipeline_of
from tiny_watched import WATCHED, kandinsky_2

from mm.adapters.formats import read_lora
from mm.core.errors import UserError
from mm.customization.customize import customize
from mm.customization.objectives.protocol import objective_of
from mm.customization.objectives.watched import WatchedDiffusion, WatchedFlow, watched

FAMILIES = (
    "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "flux-schnell", "qwen-image", "sana",
    "chroma", "lumina-2", "pixart-sigma", "aura-flow", "wan", "bria", "hunyuan-dit",
)  # fmt: skip
FAST: dict[str, Any] = {
    "steps": 6, "batch_size": 2, "size": SIDE, "preview_every": 3, "preserved": (), "learning_rate": 2e-2, "rank": 2,
    "samples": (),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_is_what_the_familys_own_objective_says(name: str) -> None:
    pipe = tiny_pipeline_of(name)
    own, read = objective_of(pipe, SIDE), watched(pipe, SIDE)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
    with torch.no_grad():
        clean = own.encode_pictures(pictures).float()
        _same(read.encode_pictures(pictures), clean)
        _same(read.decode_latents(clean), own.decode_latents(clean))
        levels = own.fixed_levels(4)[1:3]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = own.noised(clean, noise, levels)
        _same(read.noised(clean, noise, levels), noisy)
        _same(read.packed(noisy), own.packed(noisy))
        prompts = ["a red fox", "two dogs on a hill beside a lake"]
        wanted = own.predict(noisy, levels, own.encode_prompts(prompts))
        _same(read.predict(noisy, levels, read.encode_prompts(prompts)), wanted)
        _same(read.target(clean, noise, levels), own.target(clean, noise, levels))
    again = draw_with(name, pipe)
    assert torch.equal(again, draw_with(name, tiny_pipeline_of(name)))  # nothing is left on the pipeline


def _same(made: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert made.shape == wanted.shape
    assert float((made.float() - wanted.float()).abs().max()) < tolerance * float(wanted.float().abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["stable-diffusion", "flux"])
def test_a_subject_is_learned_as_by_the_familys_own_objective(
    name: str, without_objective: Any, tmp_path: Path
) -> None:  # fmt: skip
    folder = subject_folder(tmp_path / "data")
    own = customize(tiny_pipeline_of(name), folder, name="sks thing", **FAST)
    pipe = without_objective(tiny_pipeline_of(name))
    learned = customize(pipe, folder, name="sks thing", **FAST)
    assert learned.report["error"] < 1 and set(learned.entries) == set(own.entries)
    for path, entry in own.entries.items():
        for part, tensor in entry.tensors.items():
            assert torch.allclose(learned.entries[path].tensors[part].float(), tensor.float(), atol=2e-3), path
    learned.write(tmp_path / "sks.safetensors")
    learned.apply(pipe)
    ours = draw_with(name, pipe, prompt="sks thing")
    plain = tiny_pipeline_of(name)
    plain.load_lora_weights(str(tmp_path), weight_name="sks.safetensors")
    assert torch.allclose(ours, draw_with(name, plain, prompt="sks thing"), atol=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_suit_is_refused_before_the_work(without_objective: Any, tmp_path: Path) -> None:
    folder = subject_folder(tmp_path / "data")
    for name, why in (
        ("flux-fill", "its call with a prompt alone does not run through"),
        ("cogview-4", "its denoiser's times .* are no linear function of the noise levels"),
        ("z-image", "a list in place of a tensor"),
    ):
        pipe = without_objective(tiny_pipeline_of(name))
        with pytest.raises(UserError, match=f"{type(pipe).__name__} cannot be customized yet: .*{why}"):
            customize(pipe, folder, name="sks thing", **FAST)
    with pytest.raises(UserError, match="Kandinsky5T2IPipeline draws 32 x 32 pixels where 64 x 64 are asked for"):
        objective_of(tiny_pipeline_of("kandinsky-5"), 64)
    pipe = without_objective(tiny_pipeline_of("stable-diffusion"))
    pipe.text_encoder.forward = torch.no_grad()(pipe.text_encoder.forward)
    with pytest.raises(UserError, match="without gradients, so that no word is learned; choose a method that learns"):
        customize(pipe, folder, name="<sks>", method="textual-inversion", size=SIDE, steps=1)
    pipe.register_modules(vae=None)
    with pytest.raises(UserError, match=r"one denoiser \(transformer, unet\), a scheduler and a vae are needed"):
        watched(pipe, SIDE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method"), [("flux", "textual-inversion"), ("stable-diffusion", "detex")])
def test_a_word_is_learned_as_by_the_familys_own_objective(
    name: str, method: str, without_objective: Any, tmp_path: Path
) -> None:
    """FLUX has two text encoders, and detex words that differ from picture to picture."""
    folder, words = subject_folder(tmp_path / "data"), {key: value for key, value in FAST.items() if key != "rank"}
    own = customize(tiny_pipeline_of(name), folder, name="<sks>", method=method, **words)
    pipe = without_objective(tiny_pipeline_of(name))
    learned = customize(pipe, folder, name="<sks>", method=method, **words)
    assert set(learned.entries) == set(own.entries) and len(own.entries) == (2 if name == "flux" else 1)
    for path, entry in own.entries.items():
        assert torch.allclose(learned.entries[path].tensors["rows"], entry.tensors["rows"], atol=2e-3), path
    before = draw_with(name, pipe, prompt="<sks>")
    learned.apply(pipe)
    assert not torch.allclose(draw_with(name, pipe, prompt="<sks>"), before, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "calls"), [("stable-diffusion", 1), ("flux", 1), ("sana", 1)])
def test_pictures_are_predicted_in_one_call_where_the_denoiser_takes_it(name: str, calls: int) -> None:
    """Times of Stable Diffusion are one number; FLUX's positions are the same for all pictures."""
    pipe = tiny_pipeline_of(name)
    read, seen = watched(pipe, SIDE), []
    prompts, levels = ["a red fox", "two dogs on a hill", ""], torch.tensor([0.2, 0.5, 0.8])
    levels = levels if hasattr(pipe.scheduler, "sigmas") else (1000 * levels).long()
    noisy = torch.randn(3, *read.reading.grid, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditions = read.encode_prompts(prompts)
        read.predict(noisy, levels, conditions)
        denoiser = read.modules()[read.parts[0]]
        denoiser.register_forward_hook(lambda *_: seen.append(1))
        made = read.predict(noisy, levels, conditions)
        assert len(seen) == calls
        alone = torch.cat(
            [read.predict(noisy[k : k + 1], levels[k : k + 1], [one]) for k, one in enumerate(conditions)]
        )
    _same(made, alone)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*WATCHED, "kandinsky-2.2"])
def test_the_prediction_is_that_of_sampling(name: str) -> None:
    """Each step of the pipeline's own loop, without guidance, is compared with `predict`."""
    pipe = kandinsky_2() if name == "kandinsky-2.2" else tiny_pipeline_of(name)
    side = 64 if name == "kandinsky-2.2" else SIDE  # of which its sizes are multiples
    read, step, seen = objective_of(pipe, side), pipe.scheduler.step, []
    assert isinstance(read, WatchedFlow | WatchedDiffusion)
    upwards = pipe.scheduler.config.get("invert_sigmas", False)

    def spied(output: torch.Tensor, t: Any, latents: torch.Tensor, *args: Any, **more: Any) -> Any:
        level = torch.as_tensor(t).float().reshape(1)
        if isinstance(read, WatchedFlow):
            sigma = float(pipe.scheduler.sigmas[len(seen)])
            level = torch.tensor([1 - sigma if upwards else sigma])
        assert float(read.level_of(float(torch.as_tensor(t)))) == pytest.approx(float(level), abs=2e-3)
        seen.append((level, read._unpacked(latents.clone()), read._unpacked(-output if upwards else output).float()))
        return step(output, t, latents, *args, **more)

    pipe.scheduler.step = spied
    pipe(**read._watch.given("a red fox", 3) | {"output_type": "latent"})
    pipe.scheduler.step = step
    assert len(seen) == 3
    with torch.no_grad():
        conditions = [read.encode_prompts([prompt]) for prompt in ("a red fox", "two dogs on a hill")]
        for level, noisy, wanted in seen:
            made, other = (read.predict(noisy, level, condition) for condition in conditions)
            _same(made, wanted, 2e-2 if name == "hidream" else 1e-4)  # whose scheduler rounds its timesteps
            assert float((made - other).abs().max()) > 1e-4 * float(wanted.abs().max())  # a wrong prompt is seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WATCHED)
def test_a_family_learns_and_draws_what_it_learned(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline_of(name)
    learned = customize(pipe, subject_folder(tmp_path / "data"), name="sks thing", **FAST)
    assert learned.report["error"] < 1
    learned.write(tmp_path / "sks.safetensors")
    plain = draw_with(name, pipe, prompt="sks thing")
    learned.apply(pipe)
    ours = draw_with(name, pipe, prompt="sks thing")
    assert not torch.allclose(plain, ours, atol=1e-4)
    again = tiny_pipeline_of(name)
    read_lora(tmp_path / "sks.safetensors", again).apply(again)
    assert torch.allclose(ours, draw_with(name, again, prompt="sks thing"), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_flow_the_other_way_is_not_taken_for_one_from_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mochi's scheduler counts upwards; without that its pictures would be learned as noise."""
    pipe = tiny_pipeline_of("mochi")
    monkeypatch.setattr(WatchedFlow, "_flow", 1)
    with pytest.raises(UserError, match="its sampling is no flow from noise to pictures along straight lines"):
        objective_of(pipe, SIDE)
