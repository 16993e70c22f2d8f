"""Adaptive Guidance for any diffusers pipeline with classifier-free guidance, without changing its code.

Design choices
- Within `adaptive_guidance(pipe)` the pipeline's denoiser is replaced by `_Denoiser`, which passes on the rows that are
  needed and fills in the others. The module itself is not touched: compiled, offloaded and quantized ones work, and
  other pipelines that share it see nothing.
- Pipelines differ in how they guide: one call on a batch of both halves, in either order, or two calls a step; outputs
  with learned variances or tokens of a source picture; signs; renormalized mixtures. None of this is written down by
  class. At the first step everything is computed. `scheduler.step` then shows the mixture and the number of pictures,
  and least squares over the two predictions say which one is the conditional one: the one with the larger coefficient.
- What is no such mixture (three predictions a step) is an error after one step, not a picture that was drawn in full.

Legend: R rows of a call, B pictures, N values of a prediction.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.fast.guidance import AdaptiveGuidance, GuidanceGate
from mm.fast.rows import flat, prediction_of, selected, shaped, with_prediction

DENOISERS = ("unet", "transformer", "transformer_2")
_LATENTS = ("hidden_states", "sample", "x")  # the denoiser's first argument, where it is given by name
_MISFIT = 0.5  # relative distance from a mixture of two predictions; renormalized mixtures stay well below


@dataclass(kw_only=True)
class GuidanceReport:
    """What a run computed.

    Attributes:
        steps: Calls of the scheduler.
        rows: Rows that the denoiser computed.
        full_rows: Rows that it would have computed without Adaptive Guidance.
        guided: Whether there was any guidance to leave out.
    """

    steps: int = 0
    rows: int = 0
    full_rows: int = 0
    guided: bool = False


@contextmanager
def adaptive_guidance(pipe: Any, settings: AdaptiveGuidance | None = None) -> Iterator[GuidanceReport]:
    """Within the context, calls of `pipe` leave out unconditional predictions that no longer matter.

    Args:
        pipe: A diffusers pipeline with a scheduler and a UNet or transformer. One call at a time.
        settings: When they are left out.

    Yields:
        Counts of the denoiser's rows, which grow while pictures are drawn.

    Raises:
        UserError: The pipeline has no denoiser or scheduler, or guides by other than two predictions a step.
    """
    names = [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not names or not hasattr(scheduler, "step"):
        raise UserError(f"{type(pipe).__name__} has no denoiser and scheduler that guidance could be left out of")
    watch = _Watch(settings or AdaptiveGuidance(), type(pipe).__name__)
    inner = {name: getattr(pipe, name) for name in names}
    own: dict[str, Any] = {name: vars(scheduler)[name] for name in ("step", "set_timesteps") if name in vars(scheduler)}
    step, restart = scheduler.step, scheduler.set_timesteps
    # set past diffusers' __setattr__, which would write the stand-in into the pipeline's config
    pipe.__dict__.update({name: _Denoiser(module, watch) for name, module in inner.items()})
    scheduler.step, scheduler.set_timesteps = watch.stepping(step), watch.restarting(restart)
    try:
        yield watch.report
    finally:
        pipe.__dict__.update(inner)
        for name in ("step", "set_timesteps"):
            delattr(scheduler, name)
        vars(scheduler).update(own)


class _Denoiser(nn.Module):
    """Stands for a denoiser within the context; everything but calls is the denoiser's own."""

    def __init__(self, inner: nn.Module, watch: _Watch) -> None:
        super().__init__()
        self.__dict__["inner"], self.__dict__["watch"] = inner, watch  # no submodule: it would be moved and saved twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["watch"].called(self.__dict__["inner"], args, kwargs)


class _Watch:
    """Calls and steps of one run.

    Args:
        settings: When predictions are left out.
        name: Of the pipeline, in messages.
    """

    def __init__(self, settings: AdaptiveGuidance, name: str) -> None:
        self.settings, self.name, self.report = settings, name, GuidanceReport()
        self._forget()

    def _forget(self) -> None:
        self.gate: GuidanceGate | None = None  # None until the first guided step is done
        self.results: list[Any] = []  # of the calls since the last step
        self.pictures, self.values = 0, 0  # B, and the N that the scheduler gets of each prediction
        self.two_calls = False
        self.uncond_first = True  # in a batch of both halves

    def restarting(self, restart: Callable[..., Any]) -> Callable[..., Any]:
        """`set_timesteps`, by which a new run begins."""

        @functools.wraps(restart)  # pipelines ask for the parameters
        def call(*args: Any, **kwargs: Any) -> Any:
            self._forget()
            return restart(*args, **kwargs)

        return call

    def stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`scheduler.step`, at which the first step's predictions and their mixture are known."""

        parameters = inspect.signature(step)

        @functools.wraps(step)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.report.steps += 1
            if self.gate is None and self.results:
                given = parameters.bind(*args, **kwargs).arguments
                self._learn(given["model_output"], given["sample"])
            self.results = []
            return step(*args, **kwargs)

        return call

    def called(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the denoiser."""
        latents = next((kwargs[name] for name in _LATENTS if name in kwargs), args[0] if args else None)
        if latents is None:
            raise UserError(f"{self.name} calls its denoiser without {' or '.join(_LATENTS)}; leave fast out")
        rows, lists = len(latents), isinstance(latents, list)
        self.report.full_rows += rows

        def compute(chosen: torch.Tensor) -> Any:
            self.report.rows += len(chosen)
            if len(chosen) == rows:
                return inner(*args, **kwargs)
            taken = tuple(selected(one, chosen, rows, lists=lists) for one in args)
            return inner(*taken, **{key: selected(one, chosen, rows, lists=lists) for key, one in kwargs.items()})

        if self.gate is not None and not self.two_calls and rows == 2 * self.pictures and not self.results:
            result = self._halves(self.gate, compute)
        elif self.gate is not None and self.two_calls and rows == self.pictures and len(self.results) == 1:
            result = self._second(self.gate, compute)
        else:  # the first step, the conditional call of two, or a step without guidance
            result = compute(torch.arange(rows))
        self.results.append(result)
        return result

    def _halves(self, gate: GuidanceGate, compute: Callable[[torch.Tensor], Any]) -> Any:
        """A call on a batch of both halves."""
        needed_B, count = gate.needed(), self.pictures
        halves = torch.arange(2 * count).chunk(2)
        uncond, cond = halves if self.uncond_first else halves[::-1]
        chosen = torch.cat([uncond[needed_B], cond]).sort().values
        result = compute(chosen)
        prediction = prediction_of(result)
        made = flat(prediction)
        place = torch.full((2 * count,), -1)
        place[chosen] = torch.arange(len(chosen))
        cond_BN = made[place[cond].to(made.device)]
        uncond_BN = None
        if needed_B.any():  # any row stands for those that were left out
            uncond_BN = made[place[uncond].clamp_min(0).to(made.device)]
        whole_BN = gate.complete(cond_BN, uncond_BN, needed_B, self.values)
        if needed_B.all():
            return result
        parts = (whole_BN, cond_BN) if self.uncond_first else (cond_BN, whole_BN)
        return with_prediction(result, shaped(torch.cat(parts), prediction))

    def _second(self, gate: GuidanceGate, compute: Callable[[torch.Tensor], Any]) -> Any:
        """The unconditional call, after the conditional one."""
        needed_B, first = gate.needed(), prediction_of(self.results[0])
        cond_BN, uncond_BN = flat(first), None
        result = compute(torch.arange(self.pictures)[needed_B]) if needed_B.any() else self.results[0]
        if needed_B.any():
            uncond_BN = cond_BN.clone()
            uncond_BN[needed_B.to(cond_BN.device)] = flat(prediction_of(result))
        whole_BN = gate.complete(cond_BN, uncond_BN, needed_B, self.values)
        return result if needed_B.all() else with_prediction(result, shaped(whole_BN, first))

    def _learn(self, mixture: torch.Tensor, sample: torch.Tensor) -> None:
        """How this pipeline guides, from the first step that has both predictions."""
        count, predictions = len(sample), [flat(prediction_of(result)) for result in self.results]
        sizes = [len(one) for one in predictions]
        if sizes == [count]:
            return  # no guidance at this step
        if sizes not in ([2 * count], [count, count]):
            raise UserError(
                f"{self.name} makes predictions of {sizes} rows a step for "
                f"{counted(count, 'picture')}; only guidance by two "
                "predictions a picture can be left out, so leave fast out"
            )
        values = sample[0].numel()
        first, second = predictions if len(predictions) == 2 else predictions[0].chunk(2)
        weights = _mixture(flat(mixture)[:, :values], first[:, :values], second[:, :values])
        if weights is None:
            return  # the two are equal, so that nothing shows; the next step may
        self.two_calls, self.uncond_first = len(sizes) == 2, abs(weights[1]) > abs(weights[0])
        if weights[0] * weights[1] >= 0 or (self.two_calls and self.uncond_first):
            raise UserError(
                f"{self.name} mixes its predictions as {weights[0]:.2f} and {weights[1]:.2f}, which is no "
                "classifier-free guidance that a prediction can be left out of; leave fast out"
            )
        self.pictures, self.values, self.report.guided = count, values, True
        self.gate = GuidanceGate(self.settings, count)
        uncond, cond = (first, second) if self.uncond_first else (second, first)
        self.gate.complete(cond, uncond, torch.ones(count, dtype=torch.bool), values)


def _mixture(mixture: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[float, float] | None:
    """The coefficients by which two predictions (B, N) give their mixture; None where the two are equal.

    Raises:
        UserError: They do not.
    """
    apart, both = (second - first).double().flatten(), first.double().flatten()
    if apart.norm() <= 1e-6 * both.norm():
        return None
    wanted = mixture.to(both.device).double().flatten()
    found = torch.linalg.lstsq(torch.stack([both, apart], 1).cpu(), wanted[:, None].cpu()).solution[:, 0]
    misfit = float((wanted.cpu() - found[0] * both.cpu() - found[1] * apart.cpu()).norm() / wanted.norm())
    if not misfit < _MISFIT:
        raise UserError("this pipeline does not mix a conditional and an unconditional prediction; leave fast out")
    return float(found[0] - found[1]), float(found[1])
