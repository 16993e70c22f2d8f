"""Readers of fingerprints: pictures to logits of bits, and of whether there is a fingerprint at all.

Design choices
- `TileReader` serves decoders that enlarge by pixel shuffle: shifts of a convolution before it become a pattern that
  repeats every P pixels. What is seen is averaged over the tiles of P x P pixels, which averages the content away, and
  one linear map reads the bits. What a crop has shifted is found by trying all shifts of the tile (P x P of them).
- What is seen is either the difference from the neighbourhood (in closed form), or what convolutions make of the
  picture; they learn to leave its content out.
- `NetworkReader` serves every decoder, by convolutions and a mean over the picture; it needs a longer training.
- The map starts as a set of orthogonal patterns of low frequency, which survive JPEG and half the size; training fits
  it to the decoder and to what pictures hold.

Legend: B pictures, K bits, N candidates, P side of a tile, Q = P / stride cells of a tile, F features, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.provenance.attacks import at_side

_SEED = 20240604  # of how waves are mixed
_BOUND = 0.015  # of the difference from the neighbourhood, pictures in [0, 1]
_TILE_GAIN = 100.0
_FEATURE_GAIN = 20.0  # of features in [-1, 1], whose means over tiles are small
_START = 2.0  # norm of a row of the tile reader's map
_DILATIONS = (1, 2, 1)
_FEATURES = 12  # of a cell
_LARGEST = 4  # trained sides of which a picture is read as it is; photographs of megapixels would take minutes


def details(pictures_B3HW: Tensor, reach: int = 4, bound: float = _BOUND) -> Tensor:
    """The difference from the mean over 2 reach + 1 pixels each way, bounded smoothly."""
    side = 2 * reach + 1
    rows = F.avg_pool2d(F.pad(pictures_B3HW, (reach,) * 4, mode="reflect"), (side, 1), 1)
    local = F.avg_pool2d(rows, (1, side), 1)  # separable: 2 (2 reach + 1) additions a pixel instead of their square
    return bound * torch.tanh((pictures_B3HW - local) / bound)


class _CellFeatures(nn.Module):
    """Features in [-1, 1] of each cell of 2 x 2 pixels, by convolutions that see 22 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(24, width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in _DILATIONS)
        self.last = nn.Conv2d(width, _FEATURES, 1)

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        fine = details(pictures_B3HW, bound=0.05) / 0.05
        x = self.first(F.pixel_unshuffle(torch.cat([4 * pictures_B3HW - 2, fine], 1), 2))
        for layer in self.layers:
            x = x + layer(F.silu(x))
        return torch.tanh(self.last(F.silu(x)))


class TileReader(nn.Module):
    """Reads a pattern that repeats every `period` pixels; logits (B, K + 1), the last for its presence.

    Args:
        bits: K.
        side: of the pictures that the decoder draws.
        period: P; even where there are convolutions.
        width: channels of the convolutions; 0 sees the difference from the neighbourhood instead.
    """

    def __init__(self, bits: int, side: int, period: int, width: int = 0) -> None:
        super().__init__()
        self.side, self.period = side, period
        self.eye = _CellFeatures(width) if width else None
        self.stride = 2 if width else 1
        if width and period % 2:
            raise UserError(f"period is {period}; a reader with convolutions needs an even one")
        across = period // self.stride
        cells = across**2
        self.out = nn.Linear(_FEATURES * cells if width else 3 * cells, bits + 1)
        with torch.no_grad():
            if width:
                self.out.weight.mul_(0.3)
            else:
                self.out.weight.copy_(_START * carriers(bits + 1, period))
            self.out.bias.zero_()
        steps = torch.arange(across)
        rows = (steps[:, None] + steps).remainder(across)  # (turn, cell)
        turns = rows[:, None, :, None] * across + rows[None, :, None, :]
        self.register_buffer("turns", turns.flatten(2).flatten(0, 1), persistent=False)
        self.turns: Tensor

    def tile(self, pictures_B3HW: Tensor) -> Tensor:
        """The mean tile (B, F, Q, Q)."""
        period = self.period
        height, width = (side // period * period for side in pictures_B3HW.shape[-2:])
        if self.eye is None:
            seen, gain = details(pictures_B3HW, period // 2)[..., :height, :width], _TILE_GAIN
        else:
            seen, gain = self.eye(pictures_B3HW[..., :height, :width]), _FEATURE_GAIN
        cells = period // self.stride
        return gain * seen.unflatten(3, (-1, cells)).unflatten(2, (-1, cells)).mean((2, 4))

    def places(self, pictures_B3HW: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Logits (B, N, K + 1) at every shift by whole cells, that of `shift` first.

        Args:
            pictures_B3HW: at the trained size.
            shift: by how many pixels down and right of its start the pattern is. What is less than a cell is cut off.
        """
        down, right = (by % self.period for by in shift)
        tile = self.tile(pictures_B3HW[..., down % self.stride :, right % self.stride :])
        return self._turned(torch.roll(tile, (-(down // self.stride), -(right // self.stride)), (2, 3)))

    def _turned(self, tile_BFQQ: Tensor) -> Tensor:
        flat_BFN = tile_BFQQ.flatten(2)
        turns_BNFN = flat_BFN[..., self.turns].transpose(1, 2)
        out: Tensor = self.out(turns_BNFN.flatten(2))
        return out

    def candidates(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N, K + 1), and what is known of the places before (N,) as log odds.

        Places are every shift, at the given size and at the trained one; half of all pictures are taken to be whole.
        Of large pictures the middle is read at the given size.
        """
        period, stride = self.period, self.stride
        found, before = [], []
        sizes = (
            [_middle(pictures_B3HW, _LARGEST * self.side)] if min(pictures_B3HW.shape[-2:]) >= period + stride else []
        )
        if pictures_B3HW.shape[-2:] != (self.side, self.side):
            sizes.append(at_side(pictures_B3HW, self.side))
        for pictures in sizes:
            # Of fewer tiles than at the trained size the mean is less certain, and so are the bits.
            tiles = (pictures.shape[-2] // period) * (pictures.shape[-1] // period)
            certain = min(1.0, tiles / (self.side // period) ** 2)
            whole = pictures.shape[-2:] == (self.side, self.side)
            for odd in [(down, right) for down in range(stride) for right in range(stride)]:
                found.append(self._turned(certain * self.tile(pictures[..., odd[0] :, odd[1] :])))
                known = torch.zeros(found[-1].shape[1], device=pictures.device)
                if whole and odd == (0, 0):
                    known[0] = math.log(period**2)
                before.append(known)
        return torch.cat(found, 1), torch.cat(before)


def _middle(pictures_B3HW: Tensor, side: int) -> Tensor:
    """The middle of pictures, at most `side` pixels each way."""
    rows, columns = (
        slice(max(0, (size - side) // 2), max(0, (size - side) // 2) + side) for size in pictures_B3HW.shape[-2:]
    )
    return pictures_B3HW[..., rows, columns]


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

    def places(self, pictures_B3HW: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
        """Logits (B, 1, K + 1) of pictures, which are scaled to the trained size; shifts need no correction."""
        seen = self.layers(details(at_side(pictures_B3HW, self.side)) / _BOUND)
        out: Tensor = self.out(seen.mean((2, 3)))
        return out[:, None]

    def candidates(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 1, K + 1), and log odds (1,) of 0."""
        return self.places(pictures_B3HW), torch.zeros(1, device=pictures_B3HW.device)
