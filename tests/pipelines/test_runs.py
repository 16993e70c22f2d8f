"""Runs on one pipeline do not affect each other: interleaved conversations, threads, callbacks of diffusers' kind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from tiny import STEPS, draw, seeded, tiny_pipeline, tiny_reader

from mm import InterleavedPipeline, TextToImagePipeline
from mm.core.errors import UserError

FIRST, SECOND = ("draw a cat", 3, 2.0), ("draw a red dog at night", 11, 6.0)


@pytest.fixture
def talker() -> InterleavedPipeline:
    pipe = InterleavedPipeline(**tiny_reader())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()  # keeps derivatives between its steps
    return pipe


def conversation(pipe: InterleavedPipeline, words: str, seed: int, scale: float) -> Any:
    """A drawing turn, then words, event by event; the text head says what each conversation has to say."""
    state = pipe.start()
    for turn in (words, "how many are there?"):
        for event in pipe.turn(state, turn, seed=seed, steps=STEPS, guidance_scale=scale):
            yield event.kind, event.word, None if event.picture is None else event.picture.tobytes()


def test_interleaved_conversations_are_those_that_run_alone(talker) -> None:
    alone = [list(conversation(talker, *which)) for which in (FIRST, SECOND)]
    both = [conversation(talker, *which) for which in (FIRST, SECOND)]
    mixed: list[list[Any]] = [[], []]
    running = {0, 1}
    while running:
        for k in sorted(running):
            event = next(both[k], None)
            if event is None:
                running.discard(k)
            else:
                mixed[k].append(event)
    assert mixed == alone
    assert all([word for kind, word, _ in events if kind == "word"] for events in alone)
    assert len({picture for kind, _, picture in alone[0] + alone[1] if kind == "picture"}) == 2


def test_calls_in_two_threads_draw_what_they_draw_alone() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    jobs: list[dict[str, Any]] = [
        {"prompt": "a red cat", "generator": seeded(1)[0], "guidance_scale": 2.0, "num_inference_steps": 4},
        {"prompt": "two dogs", "generator": seeded(2)[0], "guidance_scale": 7.0, "num_inference_steps": 6},
        {"prompt": "a bus", "generator": seeded(3)[0], "mode": "codes", "temperature": 0.2, "num_inference_steps": 5},
    ]
    alone = [draw(pipe, **job) for job in jobs]
    barrier = threading.Barrier(len(jobs))

    def job(options: dict[str, Any]) -> torch.Tensor:
        def meet(_pipe: Any, step: int, _timestep: Any, _tensors: Any) -> dict[str, Any]:
            if step < 3:  # every step of one call falls between two of another
                barrier.wait(timeout=300)
            return {}

        return draw(pipe, callback_on_step_end=meet, **options)

    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(job, jobs))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_a_callback_sees_and_stops_its_own_run() -> None:
    """A run within another's callback: each reads its own scale and number of steps, and stops itself alone."""
    pipe = tiny_pipeline()
    seen: list[tuple[str, float, int]] = []

    def inner(p: TextToImagePipeline, step: int, *_: Any) -> dict[str, Any]:
        seen.append(("inner", p.guidance_scale, p.num_timesteps))
        p._interrupt = True
        return {}

    def outer(p: TextToImagePipeline, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            draw(p, guidance_scale=5.0, num_inference_steps=4, callback_on_step_end=inner)
        seen.append(("outer", p.guidance_scale, p.num_timesteps))
        return {}

    draw(pipe, guidance_scale=2.0, num_inference_steps=3, callback_on_step_end=outer)
    assert seen == [("inner", 5.0, 4), *[("outer", 2.0, 3)] * 3]


def test_an_interrupt_from_outside_stops_the_runs_in_progress() -> None:
    pipe = tiny_pipeline()
    steps: list[int] = []

    def count(p: TextToImagePipeline, step: int, *_: Any) -> dict[str, Any]:
        steps.append(step)
        if step == 1:
            stopper = threading.Thread(target=setattr, args=(p, "_interrupt", True))
            stopper.start()
            stopper.join()
        return {}

    draw(pipe, num_inference_steps=6, callback_on_step_end=count)
    assert steps == [0, 1]
    assert draw(pipe).isfinite().all()
    pipe._interrupt = True  # nothing runs, so nothing stops
    assert torch.equal(draw(pipe), draw(tiny_pipeline()))


def test_a_callback_may_switch_guidance_off_as_diffusers_own_does() -> None:
    from diffusers.callbacks import SDCFGCutoffCallback

    class Cutoff(SDCFGCutoffCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
            if step_index == self.config.cutoff_step_index:
                pipeline._guidance_scale = 0.0
            return callback_kwargs

    def change(scale: float) -> Any:
        def callback(p: TextToImagePipeline, step: int, *_: Any) -> dict[str, Any]:
            p._guidance_scale = scale
            return {}

        return callback

    pipe = tiny_pipeline()
    full, off = draw(pipe, guidance_scale=4.0), draw(pipe, guidance_scale=1.0)
    cut = draw(pipe, guidance_scale=4.0, callback_on_step_end=Cutoff(cutoff_step_ratio=None, cutoff_step_index=0))
    assert not torch.allclose(cut, full, atol=1e-3)
    assert not torch.allclose(cut, off, atol=1e-3)
    with pytest.raises(UserError, match=r"cannot become 3\.0 in a run that began with 1\.0"):
        draw(pipe, guidance_scale=1.0, callback_on_step_end=change(3.0))
    with pytest.raises(UserError, match="within a step callback only"):
        pipe._guidance_scale = 2.0
