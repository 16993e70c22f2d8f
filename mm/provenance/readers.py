"""Readers of fingerprints: pictures to logits of bits, and of whether there is a fingerprint at all.

Design choices
- `TileReader` serves decoders that enlarge by pixel shuffle: shifts of a convolution before it become a pattern that
  repeats every P pixels. The picture is averaged over its tiles of P x P pixels, which averages its content away, and
  one linear map reads the bits. What a crop has shifted is found by trying all shifts of the tile (P x P of them).
- `NetworkReader` serves every decoder, by convolutions and a mean over the picture; it needs a longer training.
- The map starts as a set of orthogonal patterns of low frequency, which survive JPEG and half the size; training fits
  it to the decoder and to what pictures hold.
- Both see what differs from the neighbourhood, bounded, so that a picture's own edges do not hide the pattern.

Legend: B pictures, K bits, N candidates, P side of a tile, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.core.errors import UserError

_SEED = 20240604  # of how waves are mixed
_BOUND = 0.015  # of the difference from the neighbourhood, pictures in [0, 1]
_TILE_GAIN = 100.0
_START = 2.0  # norm of a row of the tile reader's map


def details(pictures_B3HW: Tensor, reach: int = 4) -> Tensor:
    """The difference from the mean over 2 reach + 1 pixels each way, bounded smoothly."""
    local = F.avg_pool2d(F.pad(pictures_B3HW, (reach,) * 4, mode="reflect"), 2 * reach + 1, 1)
    return _BOUND * torch.tanh((pictures_B3HW - local) / _BOUND)


def at_side(pictures_B3HW: Tensor, side: int) -> Tensor:
    """Pictures scaled to a side."""
    if pictures_B3HW.shape[-2:] == (side, side):
        return pictures_B3HW
    return F.interpolate(pictures_B3HW, (side, side), mode="bilinear", align_corners=False)


class TileReader(nn.Module):
    """Reads a pattern that repeats every `period` pixels; logits (B, K + 1), the last for its presence."""

    def __init__(self, bits: int, side: int, period: int) -> None:
        super().__init__()
        self.side, self.period = side, period
        self.out = nn.Linear(3 * period * period, bits + 1)
        with torch.no_grad():
            self.out.weight.copy_(_START * carriers(bits + 1, period))
            self.out.bias.zero_()

    def tile(self, pictures_B3HW: Tensor) -> Tensor:
        """The mean tile (B, 3, P, P)."""
        period = self.period
        height, width = (side // period * period for side in pictures_B3HW.shape[-2:])
        seen = details(pictures_B3HW, period // 2)[..., :height, :width]
        tiles = seen.unflatten(3, (-1, period)).unflatten(2, (-1, period))
        return _TILE_GAIN * tiles.mean((2, 4))

    def forward(self, pictures_B3HW: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Logits of pictures at the trained size, whose pattern is `shift` pixels down and right of its start."""
        tile = self.tile(pictures_B3HW)
        return self.out(torch.roll(tile, (-shift[0], -shift[1]), (2, 3)).flatten(1))

    def candidates(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N, K + 1), and what is known of the places before (N,) as log odds.

        Places are every shift, at the given size and at the trained one; half of all pictures are taken to be whole.
        """
        period = self.period
        found, before = [], []
        sizes = [pictures_B3HW] if min(pictures_B3HW.shape[-2:]) >= period else []
        if pictures_B3HW.shape[-2:] != (self.side, self.side):
            sizes.append(at_side(pictures_B3HW, self.side))
        for pictures in sizes:
            # Of fewer tiles than at the trained size the mean is less certain, and so are the bits.
            tiles = (pictures.shape[-2] // period) * (pictures.shape[-1] // period)
            certain = min(1.0, tiles / (self.side // period) ** 2)
            tile = certain * self.tile(pictures)
            whole = pictures.shape[-2:] == (self.side, self.side)
            before += [math.log(period**2) if whole else 0.0, *[0.0] * (period**2 - 1)]
            found += [
                self.out(torch.roll(tile, (-down, -right), (2, 3)).flatten(1))
                for down in range(period)
                for right in range(period)
            ]
        return torch.stack(found, 1), torch.tensor(before)


def carriers(count: int, period: int) -> Tensor:
    """Orthogonal tiles (count, 3 P P) of norm 1, mixed from the waves of lowest frequency, without their mean."""
    places = torch.arange(period) / period * 2 * math.pi
    waves = []
    for down in range(period // 2):
        for right in range(-(period // 2) + 1, period // 2):
            if (down, right) > (0, 0):
                angle = down * places[:, None] + right * places
                waves += [(down**2 + right**2, angle.cos()), (down**2 + right**2, angle.sin())]
    waves.sort(key=lambda wave: wave[0])
    most = max(count, min(3 * len(waves), 4 * count))
    if 3 * len(waves) < count:
        raise UserError(
            f"a tile of {period} pixels holds {3 * len(waves)} patterns; {count - 1} bits need a larger one"
        )
    rows = [
        torch.cat([wave.flatten() * (channel == k) for k in range(3)]) for _, wave in waves for channel in range(3)
    ][:most]
    basis = torch.stack(rows)
    basis = basis / basis.norm(dim=1, keepdim=True)
    mixed = torch.linalg.qr(torch.randn(most, most, generator=torch.Generator().manual_seed(_SEED)))[0]
    return mixed[:count] @ basis


class NetworkReader(nn.Module):
    """Reads what convolutions find anywhere in the picture; logits (B, K + 1), the last for its presence."""

    def __init__(self, bits: int, side: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.side = side
        layers: list[nn.Module] = []
        wide = 3
        for number, width in enumerate(widths):
            kernel, stride = (5 if number == 0 else 3), (2 if number < 3 else 1)
            layers += [nn.Conv2d(wide, width, kernel, stride, padding=1), nn.SiLU()]
            wide = width
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(wide, bits + 1)

    def forward(self, pictures_B3HW: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Logits of pictures at the trained size; shifts need no correction."""
        return self.out(self.layers(details(pictures_B3HW) / _BOUND).mean((2, 3)))

    def candidates(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 1, K + 1), and log odds (1,) of 0."""
        return self(at_side(pictures_B3HW, self.side))[:, None], torch.zeros(1)
