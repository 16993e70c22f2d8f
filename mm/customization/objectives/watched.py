"""An objective for any pipeline of diffusers that draws from text: what its call does is watched, not written down.

The call runs a few times with hooks on its denoiser, scheduler and autoencoder. What is read off:

- which argument of the denoiser is the noisy latents, which the time, and what the time is of a noise level;
- what the denoiser reads of a prompt: all its other arguments;
- how the denoiser's output becomes what the scheduler gets (its sign, and which channels count);
- how final latents become what the autoencoder decodes: a permutation of values, and a scale and a shift a channel.
  They are found by giving the scheduler's last step latents of known values.

Design choices
- Each reading is checked against what the call itself does, and a pipeline that does something else is refused.
- Pictures are read one by one, with the arguments that the call gives for one prompt, so that no padding needs to be
  known. Text encoders run in the call, without gradients: no word is learned.

Legend: B pictures, C channels, H x W latents, S side of the pictures, P values of a picture's latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.objectives.protocol import DiffusionObjective, FlowObjective, Objective
from mm.customization.objectives.reading import Reading, counted_channels, reading_of
from mm.customization.objectives.watching import Watch, first_of

_DENOISERS = ("transformer", "unet")
_READINGS: WeakKeyDictionary[Any, dict[Any, Reading]] = WeakKeyDictionary()  # by pipeline


class _Watched(Objective):
    """What both kinds of pipelines share."""

    trains_words = False

    def __init__(self, pipe: Any, side: int) -> None:
        super().__init__(pipe, side)
        has = {name: part for name, part in pipe.components.items() if part is not None}
        found = [name for name in _DENOISERS if name in has]
        if len(found) != 1 or not {"scheduler", "vae"} <= set(has):
            raise UserError(
                f"{type(pipe).__name__} cannot be customized yet: it has the components {', '.join(sorted(has))}, and "
                "one denoiser (transformer, unet), a scheduler and a vae are needed"
            )
        self.parts = (found[0],)
        self._watch = Watch(pipe, side, found[0])
        self.reading = self._read()

    def _read(self) -> Reading:
        """What was read off this pipeline before, or is now."""
        pipe = self.pipe
        known = _READINGS.setdefault(pipe, {})
        parts = [pipe.components[name] for name in ("scheduler", "vae", *self.parts)]
        key = (self.side, *((type(part), str(part.config), getattr(part, "dtype", None)) for part in parts))
        if key not in known:
            try:
                known[key] = reading_of(self._watch, self._levels_of_call)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"{type(pipe).__name__} cannot be customized yet: its call with a prompt alone does not run "
                    f"through ({type(error).__name__}: {str(error)[:200]})"
                ) from error
        return known[key]

    @abstractmethod
    def _levels_of_call(self, steps: int) -> list[float]:
        """What the times of the call's steps depend on."""

    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        vae, r = self.pipe.vae, self.reading
        given = pictures_B3SS[:, :, None] if r.frames else pictures_B3SS
        made = vae.encode(given.to(vae.device, vae.dtype))
        latents = made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent
        latents = (latents[:, :, 0] if r.frames else latents).float()
        return (latents - r.shift_C11.to(latents)) / r.scale_C11.to(latents)

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        vae, r = self.pipe.vae, self.reading
        latents = latents_BCHW * r.scale_C11.to(latents_BCHW) + r.shift_C11.to(latents_BCHW)
        latents = (latents[:, :, None] if r.frames else latents).to(vae.device, vae.dtype)
        made = first_of(vae.decode(latents))
        return made[:, :, 0] if r.frames else made

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        r = self.reading
        out = torch.empty_like(latents_BCHW.flatten(1))
        out[:, r.place_P.to(out.device)] = latents_BCHW.flatten(1)
        return out.view(-1, *r.shape[1:])

    def _unpacked(self, packed: Tensor) -> Tensor:
        return packed.flatten(1)[:, self.reading.place_P.to(packed.device)].view(-1, *self.reading.grid)

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        return [self._condition(prompt) for prompt in prompts]

    def _condition(self, prompt: str) -> dict[str, Any]:
        r = self.reading
        given = self._watch(prompt, until="denoiser").arguments[0]
        return {name: self._own(value) for name, value in given.items() if name != r.noisy}

    def _own(self, value: Any) -> Any:
        """The row of an argument that reads the prompt."""
        r = self.reading
        if r.rows > 1 and isinstance(value, Tensor) and value.ndim and len(value) == r.rows:
            return value[r.row : r.row + 1]
        if isinstance(value, dict):
            return {name: self._own(one) for name, one in value.items()}
        return value

    def joined(self, conditions: Sequence[Any]) -> Any:
        return [one for condition in conditions for one in condition]

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        raise UserError(f"{type(self.pipe).__name__} gives no text features; choose another method")

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        r = self.reading
        denoiser, rows = self.modules()[self.parts[0]], []
        for k, given in enumerate(condition):
            packed = self.packed(noisy_BCHW[k : k + 1])
            time = torch.full_like(given[r.times], float(r.per_level * level_B[k] + r.at_zero))
            made = denoiser(**given | {r.noisy: packed.to(r.dtype), r.times: time})
            rows.append(r.sign * counted_channels(first_of(made), packed).float())
        return self._unpacked(torch.cat(rows))


class WatchedFlow(_Watched, FlowObjective):
    """A pipeline under flow matching: times are a function of noise levels."""

    def _levels_of_call(self, steps: int) -> list[float]:
        return [float(x) for x in self.pipe.scheduler.sigmas[:steps]]


class WatchedDiffusion(_Watched, DiffusionObjective):
    """A pipeline under discrete diffusion: times are a function of the scheduler's timesteps."""

    def _levels_of_call(self, steps: int) -> list[float]:
        return [float(x) for x in self.pipe.scheduler.timesteps[:steps]]


def watched(pipe: Any, side: int) -> Objective:
    """The objective of a pipeline whose calls are watched.

    Args:
        pipe: of diffusers, which draws from text.
        side: of the training pictures in pixels.

    Raises:
        UserError: for a pipeline that this does not suit, with the reason.
    """
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    flow = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
    return WatchedFlow(pipe, side) if flow else WatchedDiffusion(pipe, side)
