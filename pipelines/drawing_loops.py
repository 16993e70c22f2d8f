"""From a condition to latents along the flow; `mm.pipelines.code_filling` does it in codes.

Legend: B pictures, C = 16 channels, H = W = 8 latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any

import torch

from mm.core.errors import UserError
from mm.models.velocity import VelocityDecoder
from mm.pipelines.drawing_parts import DrawingParts
from mm.pipelines.fast import FastFlow
from mm.pipelines.flow_velocity import FlowVelocity
from mm.pipelines.run_state import Run


def flow_steps(
    parts: DrawingParts, velocity_decoder: VelocityDecoder, latents: torch.Tensor
) -> Generator[int, None, torch.Tensor]:  # fmt: skip
    """Integrates the flow with the run's scheduler, step by step.

    Args:
        parts: What is drawn with; its generators serve schedulers that draw noise.
        velocity_decoder: Computes the velocity from features.
        latents: Starting noise (B, C, H, W), float32.

    Yields:
        How many steps are done.

    Returns:
        The latents (B, C, H, W).

    Raises:
        UserError: For a scheduler that does not integrate a flow.
    """
    run, scheduler = parts.run, parts.run.scheduler
    _check_flow(scheduler)
    _set_levels(scheduler, run, parts.steps, latents.device)
    run.num_timesteps = len(scheduler.timesteps)
    # Schedulers that draw noise of their own draw each picture's from its generator, too.
    own_noise = "generator" in inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": list(parts.generators)} if own_noise else {}
    step_velocity = FlowVelocity(parts, velocity_decoder, [_sigma(scheduler, t) for t in scheduler.timesteps])
    for i, timestep in enumerate(scheduler.timesteps):
        if run.interrupt:
            break
        velocity = step_velocity(i, latents)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False, **options)[0]
        latents = parts.on_step(i, timestep, latents)
        yield i + 1
    return latents


def _check_flow(scheduler: Any) -> None:
    """Raises UserError for a scheduler that would take velocities for noise, and draw something blurred in silence."""
    predicted = scheduler.config.get("prediction_type", "flow_prediction")
    if predicted != "flow_prediction":
        raise UserError(
            f"{type(scheduler).__name__} has prediction_type={predicted!r}, and this model predicts the velocity of a "
            "flow; take FlowMatchEulerDiscreteScheduler, or a scheduler made with prediction_type='flow_prediction' "
            "and use_flow_sigmas=True"
        )


def _set_levels(scheduler: Any, run: Run, steps: int, device: torch.device) -> None:
    """Sets the scheduler's noise levels: those of the call, those of `FastFlow.spaced`, or its own."""
    levels = run.sigmas
    if levels is None and isinstance(run.fast, FastFlow) and run.fast.spaced:
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            levels = [1 - step / steps for step in range(steps)]
    if levels is None:
        scheduler.set_timesteps(steps, device=device)
    else:
        scheduler.set_timesteps(sigmas=list(levels), device=device)


def _sigma(scheduler: Any, timestep: Any) -> torch.Tensor:
    return (timestep / scheduler.config.num_train_timesteps).float()


def finish(drawing: Generator[int, None, torch.Tensor], run: Run, bar: Any) -> torch.Tensor:
    """Runs a drawing to its end and shows its steps on a progress bar."""
    while True:
        try:
            next(drawing)
        except StopIteration as end:
            return end.value
        bar.total = run.num_timesteps  # some schedulers take more steps than were asked for
        bar.update()
