"""StyDeco: its losses against closed forms, its pairs, and a run in two parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.customization.batches import hash_of
from mm.customization.customize import customize
from mm.customization.data import read_folder
from mm.customization.methods.protocol import Job
from mm.customization.methods.stydeco import StyDeco, decoupling, without_style
from mm.customization.objectives.protocol import objective_of
from mm.customization.objectives.sampling import redrawn, split

FAST: dict[str, Any] = {
    "steps": 4, "batch_size": 1, "size": SIDE, "preview_every": 4, "preserved": (), "preserve": 0.0,
    "learning_rate": 1e-2, "rank": 4, "layers": "attention",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [("stable-diffusion-3", ""), *(("stable-diffusion", k) for k in ("epsilon", "v_prediction", "sample"))],
)
def test_clean_latents_and_noise_come_back_from_the_target(name: str, kind: str) -> None:
    pipe = tiny_pipeline_of(name)
    if kind:
        pipe.scheduler.register_to_config(prediction_type=kind)
    objective = objective_of(pipe, SIDE)
    generator = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(8, 4, 2, 2, generator=generator) for _ in range(2))
    level = objective.fixed_levels(8)
    noisy, target = objective.noised(clean, noise, level), objective.target(clean, noise, level)
    found = split(objective, noisy, level, target)
    assert torch.allclose(found[0], clean, atol=1e-3)
    assert torch.allclose(found[1], noise, atol=1e-3)


def test_a_model_that_knows_the_picture_redraws_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true velocity towards a picture every step ends there, whatever the guidance and the first picture."""
    objective = objective_of(tiny_pipeline_of("stable-diffusion-3"), SIDE)
    wanted, first = torch.full((2, 16, 4, 4), 0.5), torch.zeros(2, 16, 4, 4)
    monkeypatch.setattr(objective, "predict", lambda noisy, level, _: (noisy - wanted) / level.view(-1, 1, 1, 1))
    made = redrawn(
        objective, first, ["a fox"] * 2, strength=0.7, guidance=3.0, steps=8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(made, wanted, atol=1e-4)


def test_the_contrast_of_two_classes_is_that_of_the_formula() -> None:
    one, other = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[-3.0, 0.0]])
    half = math.sqrt(0.5)
    apart = [-1.0 - half, -half, -half - 1.0]  # cosines with the other mean less those with the own one
    expected = sum(math.log1p(math.exp(x / 0.5)) for x in apart) / 3
    assert float(decoupling(one, other, 0.5)) == pytest.approx(expected, rel=1e-5)
    same = torch.ones(2, 2)
    assert float(decoupling(same, same, 0.1)) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "caption",
    ["a cat on grass, <ink> style", "a cat on grass in the style of <ink>", "a cat on grass, <ink>",
     "<ink>, a cat on grass", "a <ink> style cat on grass"],
)  # fmt: skip
def test_captions_without_the_style(caption: str) -> None:
    assert without_style(caption, "<ink>") == "a cat on grass"


def test_the_loss_of_pairs_takes_both_directions_in_turn(tmp_path: Path) -> None:
    """Under flow matching the clean latents are x - s v; each direction is computed here by itself."""
    pipe = tiny_pipeline_of("stable-diffusion-3")
    objective = objective_of(pipe, SIDE)
    examples = read_folder(subject_folder(tmp_path / "data"), name="<ink>", kind="style")
    settings = {**StyDeco.defaults, "rank": 2, "apart_weight": 0.0}
    job = Job(objective=objective, examples=examples, name="<ink>", noun="", kind="style", settings=settings, seed=0)
    learner: Any = StyDeco().begin(job)
    try:
        assert learner.styled.shape == learner.plain.shape
        assert not torch.allclose(learner.styled, learner.plain, atol=1e-2)
        chosen = [1, 0]
        learner.before_step(chosen)
        for number in (0, 1):
            generator = torch.Generator().manual_seed(hash_of(211, number))
            level = objective.levels(2, generator)
            noise = torch.randn(learner.styled[chosen].shape, generator=generator)
            start, end = learner.plain[chosen], learner.styled[chosen]
            captions = [examples[i].caption for i in chosen]
            if number:
                start, end, captions = end, start, [without_style(caption, "<ink>") for caption in captions]
            s = level.view(-1, 1, 1, 1)
            noisy = (1 - s) * start + s * noise
            velocity = objective.predict(noisy, level, objective.encode_prompts(captions))
            expected = 0.5 * (noisy - s * velocity - end).square().mean()
            assert float(learner.extra_loss().detach()) == pytest.approx(float(expected), rel=1e-4)
            learner.after_step(number)
    finally:
        learner.remove()


def test_a_run_in_two_parts_ends_in_the_same_values(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path / "data")

    def run(**more: Any) -> Any:
        pipe = tiny_pipeline_of("stable-diffusion")
        return customize(pipe, folder, name="<ink>", kind="style", method="stydeco", samples=(), **FAST, **more)

    def stop(share: float, text: str) -> None:
        if share > 0.4:
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(work=tmp_path / "work", save_every=1, progress=stop)
    again = run(work=tmp_path / "work", save_every=1)
    for path, entry in whole.entries.items():
        for key, value in entry.tensors.items():
            assert torch.equal(value, again.entries[path].tensors[key]), path
