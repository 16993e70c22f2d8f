"""An objective for any pipeline of diffusers that draws from text: what its call does is watched, not written down.

The call runs a few times with hooks on its denoiser, scheduler and autoencoder. What is read off:

- which argument of the denoiser is the noisy latents, which the time, and what the time is of a noise level;
- what the denoiser reads of a prompt: all its other arguments;
- how the denoiser's output becomes what the scheduler gets (its sign, and which channels count);
- how final latents become what the autoencoder decodes: a permutation of values, and a scale and a shift a channel.
  They are found by giving the scheduler's last step latents of known values.

Design choices
- Each reading is checked against what the call itself does, and a pipeline that does something else is refused.
- Prompts are read one by one, with the arguments that the call gives for one prompt, so that no padding needs to be
  known. The denoiser predicts pictures in one call where that was seen to give what calls one by one give.
- Words are learned where gradients pass from what the denoiser reads to the embeddings of words, which is tried.

Legend: B pictures, C channels, H x W latents, S side of the pictures, P values of a picture's latents.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mm.adapters.tokens import tied_embeddings
from mm.core.errors import UserError
from mm.customization.objectives.processes import DiffusionObjective, FlowObjective
from mm.customization.objectives.protocol import Objective
from mm.customization.objectives.reading import Reading, close, counted_channels, reading_of
from mm.customization.objectives.rows import WAYS, Way, merged
from mm.customization.objectives.watching import Watch, autoencoder_of, first_of

_DENOISERS = ("transformer", "unet")
_READINGS: WeakKeyDictionary[Any, dict[Any, Reading]] = WeakKeyDictionary()  # by denoiser: views share it


def can_be_watched(pipe: Any) -> bool:
    """Whether a pipeline has the components that are watched; its calls may still do what does not suit."""
    has = {name for name, part in pipe.components.items() if part is not None}
    return len(has & set(_DENOISERS)) == 1 and "scheduler" in has and autoencoder_of(pipe) is not None


class _Watched(Objective):
    """What both kinds of pipelines share."""

    def __init__(self, pipe: Any, side: int) -> None:
        super().__init__(pipe, side)
        self._way: Way | None = None  # of predicting several pictures in a call; None: not found yet
        self._alone = False  # there is none
        has = {name: part for name, part in pipe.components.items() if part is not None}
        if not can_be_watched(pipe):
            raise UserError(
                f"{type(pipe).__name__} cannot be customized yet: it has the components {', '.join(sorted(has))}, and "
                "one denoiser (transformer, unet), a scheduler and a vae are needed"
            )
        self.parts = tuple(name for name in _DENOISERS if name in has)
        self._watch = Watch(pipe, side, self.parts[0])
        self.reading = self._read()

    def _read(self) -> Reading:
        """What was read off this pipeline before, or is now."""
        pipe = self.pipe
        parts = [pipe.scheduler, autoencoder_of(pipe), *self.modules().values()]
        known = _READINGS.setdefault(parts[-1], {})
        key = (type(pipe), self.side, *((type(part), str(part.config), getattr(part, "dtype", None)) for part in parts))
        if key not in known:
            try:
                with torch.no_grad():
                    known[key] = reading_of(self._watch, self._levels_of_call, self._flow)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"{type(pipe).__name__} cannot be customized yet: its call with a prompt alone does not run "
                    f"through ({type(error).__name__}: {str(error)[:200]})"
                ) from error
        self._check_size(known[key])
        return known[key]

    @torch.no_grad()
    def _check_size(self, reading: Reading) -> None:
        """Raises UserError where the call draws pictures of another size than those that are learned."""
        self.reading, side = reading, self.side
        shape = self.encode_pictures(torch.zeros(1, 3, side, side, device=self.device)).shape[1:]
        if tuple(shape) != reading.grid:
            drawn = " x ".join(str(side * have // want) for have, want in zip(reading.grid[1:], shape[1:], strict=True))
            raise UserError(
                f"{type(self.pipe).__name__} draws {drawn} pixels where {side} x {side} are asked for; give a size "
                "that it draws"
            )

    _flow: Literal[1, -1] | None = None

    @abstractmethod
    def _levels_of_call(self, steps: int) -> list[float]:
        """What the times of the call's steps depend on."""

    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        vae, r = autoencoder_of(self.pipe), self.reading
        given = pictures_B3SS[:, :, None] if r.frames else pictures_B3SS
        made = vae.encode(given.to(vae.device, vae.dtype))
        latents = made.latent_dist.mode() if hasattr(made, "latent_dist") else first_of(made)
        latents = (latents[:, :, 0] if r.frames else latents).float()
        return (latents - r.shift_C11.to(latents)) / r.scale_C11.to(latents)

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        vae, r = autoencoder_of(self.pipe), self.reading
        latents = latents_BCHW * r.scale_C11.to(latents_BCHW) + r.shift_C11.to(latents_BCHW)
        latents = (latents[:, :, None] if r.frames else latents).to(vae.device, vae.dtype)
        takes = inspect.signature(type(vae).decode).parameters
        whole = {"force_not_quantize": True} if "force_not_quantize" in takes else {}  # as pipelines call a VQModel
        made = first_of(vae.decode(latents, **whole))
        return made[:, :, 0] if r.frames else made

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        r = self.reading
        out = torch.empty_like(latents_BCHW.flatten(1))
        out[:, r.place_P.to(out.device)] = latents_BCHW.flatten(1)
        return out.view(-1, *r.shape[1:])

    def _unpacked(self, packed: Tensor) -> Tensor:
        return packed.flatten(1)[:, self.reading.place_P.to(packed.device)].view(-1, *self.reading.grid)

    @property
    def trains_words(self) -> bool:
        """Whether gradients pass from what the denoiser reads of a prompt to the embeddings of its text encoders."""
        leaves: dict[str, list[Tensor]] = {table.embedding: [] for table in self.tables}
        with ExitStack() as stack, torch.enable_grad():
            for table in self.tables:
                for module in tied_embeddings(self.pipe, table):
                    stack.callback(module.register_forward_hook(_cut_into(leaves[table.embedding])).remove)
            read = [one for one in _tensors(self._condition("a")) if one.requires_grad]
            called = [mine for mine in leaves.values() if mine]  # some encoders read special prompts alone
            if not read or not called:
                return False
            total = torch.stack([one.float().square().sum() for one in read]).sum()
            return all(
                any(made is not None for made in torch.autograd.grad(total, mine, allow_unused=True, retain_graph=True))
                for mine in called
            )

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        made = []
        for self.encoded, prompt in enumerate(prompts):
            made.append(self._condition(prompt))
        self.encoded = None
        return made

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
        if len(condition) > 1 and not self._alone:
            if self._way is None:
                self._find_way(noisy_BCHW, condition)
            given = None if self._way is None else merged(condition, self._way)
            if given is not None:
                return self._predicted(noisy_BCHW, level_B, given)
        return self._one_by_one(noisy_BCHW, level_B, condition)

    def _one_by_one(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        rows = zip(noisy_BCHW.split(1), level_B.split(1), condition, strict=True)
        return torch.cat([self._predicted(*row) for row in rows])

    def _predicted(self, noisy_BCHW: Tensor, level_B: Tensor, given: Mapping[str, Any]) -> Tensor:
        r, packed = self.reading, self.packed(noisy_BCHW)
        like = given[r.times]
        time = (r.per_level * level_B.to(like.device).double() + r.at_zero).to(like.dtype)
        if like.ndim:
            time = time.view(-1, *[1] * (like.ndim - 1)).expand(-1, *like.shape[1:])
        elif len(time) == 1:
            time = time[0]
        denoiser = self.modules()[self.parts[0]]
        made = first_of(denoiser(**{**given, r.noisy: packed.to(r.dtype), r.times: time}))
        return self._unpacked(r.sign * counted_channels(made, packed).float())

    @torch.no_grad()
    def _find_way(self, noisy_BCHW: Tensor, condition: Any) -> None:
        """Tries how pictures are predicted in one call as they are one by one, where these conditions can show it."""
        level_B = self.fixed_levels(len(condition)).to(noisy_BCHW.device)
        wanted = self._one_by_one(noisy_BCHW, level_B, condition)
        for way in WAYS:
            given = merged(condition, way)
            if given is None:
                return  # of other lengths
            try:
                if close(self._predicted(noisy_BCHW, level_B, given), wanted):
                    self._way = way
                    return
            except (RuntimeError, ValueError, IndexError, AssertionError):  # it takes no such batch
                continue
        self._alone = True


def _cut_into(leaves: list[Tensor]) -> Callable[..., Tensor]:
    """A hook that has a module's output begin a graph of its own."""

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    return cut


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors within a condition."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


class WatchedFlow(_Watched, FlowObjective):
    """A pipeline under flow matching: times are a function of noise levels."""

    @property
    def _flow(self) -> Literal[1, -1]:  # type: ignore[override]
        return -1 if self.pipe.scheduler.config.get("invert_sigmas") else 1

    def _levels_of_call(self, steps: int) -> list[float]:
        return [float(x if self._flow == 1 else 1 - x) for x in self.pipe.scheduler.sigmas[:steps]]

    def level_of(self, timestep: float) -> Tensor:
        level = super().level_of(timestep)
        return level if self._flow == 1 else 1 - level


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
