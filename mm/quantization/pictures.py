"""Pictures to calibrate with where a pipeline needs them and the caller has none: made by procedure, not at random.

Design choices
- Photographs have amplitudes that fall as one over the spatial frequency (Field 1987, "Relations between the statistics
  of natural images and the response properties of cortical cells"): coloured noise of that spectrum is the ground, over
  it a gradient, as light makes it, and a few plain shapes with edges. White noise would drive an encoder to inputs that
  no picture gives.
- The same number gives the same picture.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

_SHAPES = 5


def picture(number: int, width: int, height: int) -> Image.Image:
    """An RGB picture with the statistics of a photograph.

    Args:
        number: the seed.
        width: in pixels.
        height: in pixels.
    """
    return _image(_pixels(number, width, height))


def mask(number: int, width: int, height: int) -> Image.Image:
    """A grey mask, white where a picture is to be drawn anew: an ellipse of about a quarter of the area."""
    generator = torch.Generator().manual_seed(number)
    inside = _ellipse(generator, width, height, smallest=0.25)
    return Image.fromarray((255 * inside).to(torch.uint8).numpy(), "L")


def edges(number: int, width: int, height: int) -> Image.Image:
    """The edges of `picture(number, ...)`, white on black, for pipelines that are controlled by such."""
    grey = _pixels(number, width, height).mean(0)
    change = torch.zeros_like(grey)
    change[:, 1:] += (grey[:, 1:] - grey[:, :-1]).abs()
    change[1:] += (grey[1:] - grey[:-1]).abs()
    lines = (change > change.quantile(0.9) if change.numel() < 1 << 24 else change > 0.1).float()
    return _image(lines.expand(3, -1, -1))


def video(number: int, width: int, height: int, frames: int) -> list[Image.Image]:
    """A picture that moves sideways, a twentieth of its width a frame."""
    whole = _pixels(number, width, height)
    return [_image(whole.roll(k * max(1, width // 20), 2)) for k in range(frames)]


def _pixels(number: int, width: int, height: int) -> Tensor:
    """(3, height, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.fft.rfft2(torch.randn(3, height, width, generator=generator))
    frequency = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.rfftfreq(width).square()).sqrt()
    ground = torch.fft.irfft2(noise / frequency.clamp_min(1 / max(height, width)), s=(height, width))
    ground = ground / ground.std().clamp_min(1e-6)
    mixed = 0.5 * ground + 0.5 * ground.mean(0)  # channels of photographs move together
    slope = torch.randn(2, generator=generator)
    light = slope[0] * torch.linspace(-1, 1, height)[:, None] + slope[1] * torch.linspace(-1, 1, width)
    pixels = 0.5 + 0.16 * mixed + 0.1 * light
    for _ in range(_SHAPES):
        colour = torch.rand(3, 1, 1, generator=generator)
        inside = _ellipse(generator, width, height, smallest=0.05)
        pixels = torch.where(inside, 0.8 * colour + 0.2 * pixels, pixels)
    return pixels.clamp(0, 1)


def _ellipse(generator: torch.Generator, width: int, height: int, smallest: float) -> Tensor:
    """(height, width), True inside; radii are `smallest` to a third more than twice of it, of each side."""
    where = torch.rand(2, generator=generator) * 0.6 + 0.2
    radii = smallest * (1 + torch.rand(2, generator=generator))
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return ((rows - where[0]) / radii[0]).square() + ((columns - where[1]) / radii[1]).square() < 1


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((255 * pixels).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy(), "RGB")
