"""What a pipeline's call does between prompt, denoiser, scheduler and autoencoder, read off a few of its runs.

Design choices
- Each reading is checked against what the call itself does, and a pipeline that does something else is refused.
- Values of the latents are followed into the autoencoder by giving the scheduler's last step latents of known values:
  the digits of each value's place, which hold in bfloat16, too.

Legend: C channels, H x W latents, P values of a picture's latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.objectives.watching import Watch

_BASE = 16  # of the digits by which places of values are distinguished; bfloat16 holds them
_PROMPTS = ("a red fox", "two blue cups on a table")
_MOST_TIMES = 4096  # values of an argument that is a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What was read off a pipeline's calls.

    Attributes:
        noisy: the denoiser's argument of noisy latents; `times` that of the time.
        row: of its batch that reads the prompt, of how many `rows`.
        per_level: time = per_level x + at_zero, where x is the noise level (flow) or the scheduler's timestep.
        sign: by which its output is the noise or the velocity, pictures to noise.
        place_P: of each value of the decoder's latents (C, H, W) among those of the scheduler's.
        scale_C11: decoder's latents = scale_C11 x those of the scheduler + shift_C11.
        shape: of the scheduler's latents for one picture.
        grid: of the decoder's, without the axis of a video's frames.
        frames: whether the autoencoder has that axis.
        dtype: of the noisy latents that the denoiser gets.
    """

    noisy: str
    times: str
    row: int
    rows: int
    per_level: float
    at_zero: float
    sign: float
    place_P: Tensor
    scale_C11: Tensor
    shift_C11: Tensor
    shape: tuple[int, ...]
    grid: tuple[int, int, int]
    frames: bool
    dtype: torch.dtype


def reading_of(watch: Watch, levels: Callable[[int], list[float]], flow: Literal[1, -1] | None) -> Reading:
    """Reads a pipeline's calls.

    Args:
        watch: of the pipeline.
        levels: what the times of the last call of so many steps are to be a function of.
        flow: of flow matching 1, or -1 where its scheduler goes up from noise; None of diffusion.

    Raises:
        UserError: for a call that does something else.
    """
    name = type(watch.pipe).__name__

    def refuse(why: str) -> UserError:
        return UserError(f"{name} cannot be customized yet: {why}")

    seen, other = watch(_PROMPTS[0]), watch(_PROMPTS[1], until="denoiser")
    if len(seen.arguments) != len(seen.samples) or not seen.samples:
        raise refuse(f"its denoiser is called {len(seen.arguments)} times in {len(seen.samples)} steps")
    first, sample = seen.arguments[0], seen.samples[0]
    noisy, rows = _noisy(first, sample)
    if not noisy:
        raise refuse("no argument of its denoiser is the latents")
    times = _changing(seen.arguments, noisy)
    if len(times) != 1:
        raise refuse(f"the arguments {times} of its denoiser change from step to step")
    row = _row(first, other.arguments[0], noisy, rows)
    values = [float(given[times[0]].flatten()[-1]) for given in seen.arguments]
    per_level, at_zero = _line(levels(len(values)), values)
    if any(
        abs(per_level * x + at_zero - t) > 2e-2 * max(map(abs, values))
        for x, t in zip(levels(len(values)), values, strict=True)
    ):
        raise refuse(f"its denoiser's times {values} are no linear function of the noise levels")
    raw = seen.raw[0][row : row + 1] if rows > 1 else seen.raw[0]
    sign = next((s for s in (1.0, -1.0) if close(s * counted_channels(raw, seen.outputs[0]), seen.outputs[0])), 0.0)
    if not sign:
        raise refuse("what its scheduler gets is not its denoiser's output")
    place, scale, shift, grid, frames = _decoding(watch, sample, seen.raw[0], refuse)
    reading = Reading(
        noisy=noisy, times=times[0], row=row, rows=rows, per_level=per_level, at_zero=at_zero,
        sign=sign * (flow or 1), place_P=place, scale_C11=scale, shift_C11=shift, shape=tuple(sample.shape), grid=grid,
        frames=frames, dtype=first[noisy].dtype,
    )  # fmt: skip
    if flow is not None:
        if not close(first[noisy][-len(sample) :].float(), sample.float()):
            raise refuse("its denoiser reads scaled latents")
        _check_flow(watch, reading, sample, seen.raw[0], refuse)
    return reading


def _check_flow(
    watch: Watch, reading: Reading, sample: Tensor, raw: Tensor, refuse: Callable[[str], UserError]
) -> None:  # fmt: skip
    """Raises UserError where sampling with the velocity from zeros to the call's noise does not end at zeros."""
    given = torch.zeros_like(raw)
    counted_channels(given, sample).copy_((reading.sign * sample).to(raw).expand_as(counted_channels(given, sample)))
    found = watch(_PROMPTS[0], steps=2, output=given).decoded
    assert found is not None
    left = (found.float().cpu().view(reading.grid) - reading.shift_C11) / reading.scale_C11
    if float(left.abs().max()) > 5e-2 * float(sample.float().abs().max()):
        raise refuse("its sampling is no flow from noise to pictures along straight lines")


def counted_channels(raw: Tensor, like: Tensor) -> Tensor:
    """The channels of an output that count, where it has further ones (a learned variance, tokens behind)."""
    for axis, (have, want) in enumerate(zip(raw.shape, like.shape, strict=False)):
        if have > want:
            raw = raw.narrow(axis, 0, want)
    return raw


def _noisy(given: Mapping[str, Any], sample: Tensor) -> tuple[str, int]:
    """The argument that is the latents, up to a factor, and how many rows it has for one picture."""
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.ndim != sample.ndim or value.shape[1:] != sample.shape[1:]:
            continue
        rows = len(value) // len(sample)
        last = value[-len(sample) :].float()
        factor = float((last * sample).sum() / sample.square().sum())
        if rows in (1, 2, 3) and abs(factor) > 1e-6 and close(last / factor, sample.float()):
            return name, rows
    return "", 0


def _changing(arguments: Sequence[Mapping[str, Any]], noisy: str) -> list[str]:
    return [
        name for name, value in arguments[0].items()
        if name != noisy and isinstance(value, Tensor) and value.numel() < _MOST_TIMES
        and not torch.equal(value, arguments[1][name])
    ]  # fmt: skip


def _row(one: Mapping[str, Any], other: Mapping[str, Any], noisy: str, rows: int) -> int:
    """The row that another prompt changes; the last one where all change."""
    for name, value in one.items():
        twin = other.get(name)
        if name == noisy or not isinstance(value, Tensor) or not isinstance(twin, Tensor) or not value.ndim:
            continue
        if len(value) != rows or len(twin) != rows:
            continue
        changed = [k for k in range(rows) if value[k].shape != twin[k].shape or not torch.equal(value[k], twin[k])]
        if len(changed) == 1:
            return changed[0]
    return rows - 1


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    return slope, y[0] - slope * x[0]


def _decoding(watch: Watch, sample: Tensor, raw: Tensor, refuse: Callable[[str], UserError]) -> Any:
    """Where the decoder's values come from, and their scale and shift."""
    count = sample.numel()
    place = torch.arange(count).view(sample.shape)

    def decoded(latents: Tensor) -> Tensor:
        found = watch(_PROMPTS[0], steps=2, last=latents, output=raw).decoded
        if found is None:
            raise refuse("its autoencoder is not called")
        return found.float().cpu()

    shift = decoded(torch.zeros(sample.shape))
    scale = decoded(torch.ones(sample.shape)) - shift
    if shift.numel() != count or not bool(scale.all()):
        raise refuse("what its autoencoder gets is no scaled and shifted copy of the latents")
    found, weight = torch.zeros(shift.shape, dtype=torch.long), 1
    while weight < count:
        digits = (place // weight % _BASE).float()
        found += ((decoded(digits) - shift) / scale).round().long().clamp(0, _BASE - 1) * weight
        weight *= _BASE
    if not torch.equal(found.flatten().sort().values, torch.arange(count)):
        raise refuse("the values of its latents are mixed before they are decoded")
    frames = shift.ndim == 5
    if frames and shift.shape[2] != 1:
        raise refuse(f"its autoencoder decodes {shift.shape[2]} frames")
    shift, scale = (x.flatten(2).view(*x.shape[:2], *x.shape[-2:])[0] for x in (shift, scale))
    each = [x[:, :1, :1] for x in (scale, shift)]
    if not all(close(x, y.expand_as(x)) for x, y in zip((scale, shift), each, strict=True)):
        raise refuse("scale and shift of its latents differ within a channel")
    return found.flatten(), each[0], each[1], tuple(shift.shape), frames


def close(one: Tensor, other: Tensor, tolerance: float = 2e-2) -> bool:
    """Whether two tensors are the same but for rounding."""
    if one.shape != other.shape:
        return False
    size = other.float().abs().max().clamp_min(1e-12)
    return float((one.float() - other.float()).abs().max() / size) < tolerance
