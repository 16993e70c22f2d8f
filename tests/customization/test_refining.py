"""Subjects that are drawn again at the picture's size: noise levels as diffusers' own, and what changes."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from subject_adapters import adapter_of
from subject_pictures import WORDS
from test_apart import PROMPT, options_for, spied
from test_apart import held_places as held_places
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.core.errors import UserError
from mm.customization.apart import draw_apart
from mm.customization.apart_base import Subjects
from mm.customization.objectives.protocol import objective_of
from mm.customization.places import Box
from mm.customization.refining import inside, refined, surroundings

FAMILIES = (
    "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "flux-2", "chroma", "lumina-2",
    "aura-flow", "qwen-image", "sana", "z-image", "cogview-4", "wan", "hunyuan-image",
    "bria", "hunyuan-dit",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_noised_as_the_pipelines_scheduler_noises_them(family: str) -> None:
    """By the scheduler's own function for image-to-image, at each step, in the layout of the pipeline's call."""
    pipe = tiny_pipeline_of(family)
    pipe.set_progress_bar_config(disable=True)
    _same_levels(pipe, family)


@pytest.mark.parametrize(
    "scheduler",
    ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler",
     "UniPCMultistepScheduler"],
)  # fmt: skip
def test_other_schedulers_keep_their_own_scale(scheduler: str) -> None:
    pipe = tiny_pipeline_of("stable-diffusion")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    _same_levels(pipe, "stable-diffusion")


def _same_levels(pipe: Any, family: str) -> None:
    objective, compared = objective_of(pipe, SIDE), 0

    def callback(given: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal compared
        scheduler, latents = given.scheduler, tensors["latents"]
        if step + 1 == len(scheduler.timesteps):
            return {}
        clean = objective.encode_pictures(torch.rand(1, 3, SIDE, SIDE) * 2 - 1).float()
        noise = torch.randn(clean.shape)
        following = scheduler.timesteps[step + 1 : step + 2]
        noised = getattr(scheduler, "scale_noise", None)
        packed, packed_noise = objective.packed(clean), objective.packed(noise)
        if noised is not None:
            wanted = noised(packed, following, packed_noise)
        else:
            wanted = scheduler.add_noise(packed, packed_noise, following)
        given_levels = scheduler.sigmas if family == "cogview-4" else scheduler.timesteps  # what callbacks get
        assert float(timestep) == float(given_levels[step])
        found = objective.noised_in_call(clean, noise, objective.level_of(float(given_levels[step + 1])))
        assert found.shape == latents.shape == wanted.shape
        assert torch.allclose(found, wanted.float(), rtol=1e-4, atol=1e-4)
        compared += 1
        return {}

    options = options_for(family) | {"num_inference_steps": 4}
    pipe(prompt="a dog", generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **options)
    assert compared == len(pipe.scheduler.timesteps) - 1


@pytest.mark.filterwarnings("ignore:patch .* does not say")
@pytest.mark.parametrize("family", ["stable-diffusion", "flux", "qwen-image"])
def test_what_is_around_the_subjects_stays(family: str, held_places: None) -> None:
    pipe = tiny_pipeline_of(family)
    pipe.set_progress_bar_config(disable=True)
    adapters = [adapter_of(pipe, word, k) for k, word in enumerate(WORDS)]
    options = options_for(family) | {"num_inference_steps": 4}
    seen = spied(pipe)
    plain, _ = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, refine=0, **options).picture, seen.clear()
    made = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, **options).picture
    assert len(seen) == 5  # the base's, one of each subject, and one of each subject again
    again = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, refine=0.45, **options).picture
    assert made.tobytes() == again.tobytes() and made.size == plain.size
    changed = np.abs(np.asarray(made, dtype=int) - np.asarray(plain, dtype=int)).max(2)
    height, width = changed.shape
    assert changed[: height // 2, : width // 4].max() > 0 and changed[: height // 4, -width // 4 :].max() > 0
    assert changed[int(height * 0.85) :].max() == 0  # no subject is there


def test_only_the_last_steps_are_free() -> None:
    """Above the strength the call's latents are those of the enlarged part, and below it they are its own."""
    pipe = tiny_pipeline_of("stable-diffusion")
    objective, given, asked = objective_of(pipe, SIDE), [], []
    picture = Image.effect_noise((SIDE, SIDE), 60).convert("RGB")
    timesteps = [999.0, 700.0, 500.0, 200.0]
    like = objective.encode_pictures(torch.zeros(1, 3, SIDE, SIDE))

    def call(text: str, seed: int, on_latents: Any) -> Image.Image:
        asked.append((text, seed))
        given.extend(on_latents(step, torch.full_like(like, 50.0), timestep) for step, timestep in enumerate(timesteps))
        return Image.new("RGB", (SIDE, SIDE), "red")

    place, other = Box(left=0.25, top=0.25, right=0.5, bottom=0.5), Box(left=0.4, top=0.25, right=0.6, bottom=0.5)
    arguments: dict[str, Any] = {"seed": 7, "timesteps": timesteps, "like": like}
    made = refined(objective, picture, [place, other], 0, "a sks", call, strength=0.6, **arguments)
    assert asked == [("a sks", 7)]
    free = [(each == 50).all(1)[0] for each in given]  # of 8 x 8 cells, the part being a little more than half of them
    assert not free[0].any() and free[1].any() and not free[1].all()
    assert all(torch.equal(free[1], each) for each in free[2:])
    assert made.getpixel((10, 12)) == (255, 0, 0) != made.getpixel((16, 12))  # which is nearer to the other's centre
    assert made.crop((24, 24, SIDE, SIDE)).tobytes() == picture.crop((24, 24, SIDE, SIDE)).tobytes()
    same = refined(objective, picture, [place, other], 0, "a sks", call, strength=0.1, **arguments)
    assert same is picture and len(asked) == 1  # no noise level after the first step is as low


def test_places_keep_the_pictures_proportions() -> None:
    around = surroundings(Box(left=0.0, top=0.1, right=0.27, bottom=0.37))
    assert around.left == 0 and around.right == pytest.approx(0.6) and around.bottom == pytest.approx(0.6)
    assert surroundings(Box(left=0.1, top=0.0, right=0.9, bottom=0.2)) == Box(left=0, top=0, right=1, bottom=1)
    whole = inside(Box(left=0.3, top=0.3, right=0.9, bottom=0.6), around)
    assert (whole.left, whole.top) == (pytest.approx(0.5), pytest.approx(0.5)) and whole.right == 1


def test_each_subject_is_asked_for_alone() -> None:
    asked = Subjects(prompt="a photo of a <a> left of an <b> on grass", words=("<a>", "<b>"), seed=0)
    assert asked.prompt_about("<b>") == "a photo of a <b> on grass"
    assert asked.prompt_about("<a>") == "a photo of a <a> on grass"


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "much", True])
def test_a_share_lies_between_0_and_1(value: Any) -> None:
    pipe = tiny_pipeline_of("stable-diffusion")
    with pytest.raises(UserError, match=r"refine is .*; give a number from 0 to 1"):
        draw_apart(pipe, PROMPT, refine=value)
