"""The call of a pipeline of diffusers, with what its denoiser, its scheduler and its autoencoder get recorded."""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mm.families import family_of
from mm.families.frames import one_frame
from mm.families.sizes import exact_size
from mm.families.stepping import replaced
from mm.families.wording import as_written

STEPS = 4
_AUTOENCODERS = ("vae", "movq")


class _Enough(Exception):
    """What was wanted has been seen."""


class _Output:
    """What diffusers' denoisers and schedulers return, with one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.sample = self.prev_sample = tensor

    def __getitem__(self, _: Any) -> Tensor:
        return self.sample


@dataclass(kw_only=True)
class Seen:
    """What a call did."""

    arguments: list[dict[str, Any]] = field(default_factory=list)  # of the denoiser, at each of its calls
    raw: list[Tensor] = field(default_factory=list)  # its outputs
    samples: list[Tensor] = field(default_factory=list)  # latents that the scheduler got at each step
    outputs: list[Tensor] = field(default_factory=list)  # predictions that it got
    decoded: Tensor | None = None  # what the autoencoder got


def autoencoder_of(pipe: Any) -> Any:
    """The component that decodes latents; None where there is none."""
    found = (pipe.components.get(name) for name in _AUTOENCODERS)
    return next((part for part in found if part is not None), None)


def first_of(made: Any) -> Tensor:
    """The tensor in what a denoiser or an autoencoder returns. Raises TypeError where there is none."""
    if isinstance(made, Tensor):
        return made
    found = made[0] if isinstance(made, tuple | list) else next(iter(vars(made).values()), None)
    if not isinstance(found, Tensor):
        raise TypeError(f"a {type(found).__name__} in place of a tensor of predictions")
    return found


class Watch:
    """The calls of one pipeline at one size."""

    def __init__(self, pipe: Any, side: int, denoiser: str) -> None:
        self.pipe, self.side, self.part = pipe, side, denoiser
        self.denoiser: nn.Module = pipe.components[denoiser]
        self.vae = autoencoder_of(pipe)
        self.takes = inspect.signature(type(pipe).__call__).parameters
        self._call = getattr(type(pipe).__call__, "__wrapped__", type(pipe).__call__)  # without torch.no_grad
        self.names = list(inspect.signature(type(self.denoiser).forward).parameters)[1:]

    def __call__(
        self, prompt: str, *, steps: int = STEPS, last: Tensor | None = None, output: Tensor | None = None,
        until: str = "end",
    ) -> Seen:  # fmt: skip
        """Runs the pipeline's call, with gradients where they are enabled.

        Args:
            prompt: that it draws.
            steps: of sampling.
            last: given to it in place of the latents of its last step.
            output: given in place of each of the denoiser's outputs.
            until: "end", or "denoiser": its first call.
        """
        seen = Seen()
        pipe, scheduler = self.pipe, self.pipe.scheduler
        forward, step = self.denoiser.forward, scheduler.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(self.names, args, strict=False)) | kwargs
            seen.arguments.append({k: _copied(v) for k, v in given.items()})
            if until == "denoiser":
                raise _Enough
            if output is not None:
                return (output,) if not given.get("return_dict", True) else _Output(output)
            made = forward(*args, **kwargs)
            seen.raw.append(first_of(made).clone())
            return made

        @functools.wraps(step)  # pipelines ask for the parameters
        def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.samples.append(sample.clone())
            seen.outputs.append(model_output.clone())
            made = step(model_output, timestep, sample, *args, **kwargs)
            if last is None or len(seen.samples) < steps:
                return made
            new = last.to(sample).reshape(sample.shape)
            return (new,) if isinstance(made, tuple) else _Output(new)

        def decoded(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.decoded = latents.clone()
            raise _Enough

        quiet = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(disable=True)
        try:
            with replaced(self.denoiser, "forward", watched), replaced(scheduler, "step", stepped), \
                    replaced(self.vae, "decode", decoded), warnings.catch_warnings():  # fmt: skip
                warnings.simplefilter("ignore")
                self._call(pipe, **self.given(prompt, steps))
        except _Enough:
            pass
        finally:
            pipe.set_progress_bar_config(**quiet)
        return seen

    def given(self, prompt: str, steps: int) -> dict[str, Any]:
        """The call's arguments, without guidance."""
        family = family_of(self.pipe)
        made: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pil"} | as_written(self.takes)
        made |= exact_size(self.takes, self.side, self.side) | one_frame(self.takes)
        made |= {name: 1.0 for name in ("guidance_scale", "true_cfg_scale") if name in self.takes}
        if family is not None and family.guidance_name in self.takes:
            made[family.guidance_name] = 1.0
        made = {k: v for k, v in made.items() if k in self.takes}
        return made | {"prompt": prompt, "generator": torch.Generator().manual_seed(0)}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(_copied(one) for one in value)
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
