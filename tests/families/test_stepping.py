"""Latents after each step of a pipeline's call, with a step callback and without one."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from tiny_pipelines import SIDE, arguments_of, draw_with, tiny_pipeline_of

from mm.engine.engine import Engine
from mm.engine.events import CancelToken
from mm.engine.facts import capabilities_of
from mm.engine.requests import Draw
from mm.families import family_of, stepping

STEPS = 3


def _traced(name: str, pipe: Any, change: Any = lambda *_: None) -> tuple[list[Any], torch.Tensor]:
    """What is called after each step, and the picture."""
    seen: list[Any] = []

    def after(step: int, latents: Any, timestep: float) -> Any:
        seen.append((step, latents.clone(), timestep))
        return change(step, latents, timestep)

    given = arguments_of(name, num_inference_steps=STEPS)
    with stepping.stepping(pipe, given, after):
        return seen, torch.as_tensor(pipe(**given)[0])


@pytest.mark.parametrize("name", ["stable-diffusion", "flux", "sana"])
def test_the_scheduler_gives_what_the_callback_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    halved = lambda step, latents, timestep: latents / 2 if step else None  # noqa: E731
    pipe = tiny_pipeline_of(name)
    by_callback, wanted = _traced(name, pipe, halved)
    assert not torch.equal(wanted, _traced(name, pipe)[1])
    monkeypatch.setattr(stepping, "_takes_callback", lambda _: False)
    by_scheduler, made = _traced(name, pipe, halved)
    assert torch.equal(made, wanted) and "step" not in vars(pipe.scheduler)
    assert len(by_scheduler) == STEPS
    for one, other in zip(by_callback, by_scheduler, strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]) and one[2] == pytest.approx(other[2])


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_noise_of_a_scheduler_comes_from_the_calls_generator(scheduler: str) -> None:
    """Pipelines ask whether `step` takes one; without it two pictures of one seed would differ."""
    pipe = tiny_pipeline_of("pixart-sigma")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    wanted = draw_with("pixart-sigma", pipe, num_inference_steps=STEPS)
    assert torch.equal(_traced("pixart-sigma", pipe)[1], wanted)


def test_what_is_made_of_the_last_latents_is_decoded() -> None:
    """SANA-Sprint decodes another result of its scheduler than the one that its callback gets."""
    pipe = tiny_pipeline_of("sana-sprint")
    pipe.scheduler.config.sigma_data = 1.0
    last = torch.full((1, 4, SIDE // 2, SIDE // 2), 0.25)
    given = arguments_of("sana-sprint", output_type="latent")
    with stepping.stepping(pipe, given, lambda step, latents, timestep: last if step == 1 else None):
        made = pipe(**given)[0]
    assert torch.allclose(made, last / pipe.scheduler.config.sigma_data)


def test_the_engine_shows_steps_and_stops_without_a_callback() -> None:
    pipe = tiny_pipeline_of("pixart-sigma")
    can = capabilities_of("pixart", pipe, family_of(pipe), None)
    small = Image.new("RGB", (8, 8))
    engine = Engine(pipe, can, name="pixart", pipeline_for=lambda _: pipe, preview=lambda latents, size: [small])
    request = Draw(prompt="a fox", size=(SIDE, SIDE), steps=STEPS, seed=1, options={"use_resolution_binning": False})
    cancel, seen = CancelToken(), []

    def note(event: Any) -> None:
        seen.append((type(event).__name__, getattr(event, "step", None)))
        if seen[-1] == ("Step", 2):
            cancel.cancel()

    engine.run(request, cancel, previews=True).each(note)
    assert seen == [("Step", 1), ("Preview", None), ("Step", 2), ("Preview", None), ("Done", None)]
