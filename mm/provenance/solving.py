"""A fingerprint for the reader of tiles in closed form: which shifts of the decoder's convolutions to use, and how to
read them.

Design choices
- Every shift is probed: it changes pictures by D and the mean tile that the reader sees by J, both on average over some
  pictures. The squared change of pixels is then s' Q s, Q = E[D D'], and what the reader gains is s' J' C^-1 J s, where
  C is the covariance of the tiles of plain pictures, attacks included (Fisher's linear discriminant). The directions
  with the most gain at one cost are generalized eigenvectors of the two; the bits share them evenly, by an orthogonal
  mix.
- J is that of pictures at half their size and back, in grey: halving takes most of a pattern away, and JPEG most of its
  colour.
- The reader's map is then fitted by logistic regression on marked pictures after attacks, which is convex.

Legend: n shifts, T = 3 P P values of a tile, K bits, B pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.provenance.attacks import at_side, jpeg, rounded, scaled
from mm.provenance.fingerprint import Fingerprint, shifting
from mm.provenance.readers import TileReader

Decode = Callable[[Tensor], Tensor]
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as in JPEG
_PROBED = 4  # pictures on which shifts are probed
_AT_ONCE = 32  # shifts
_RIDGE = 1e-3
_COVER_RIDGE = 1e-2  # tiles of grey have a third of the values' rank
_PRESENCE = 3.0  # strength of the constant part, as a multiple of a bit's


@torch.no_grad()
def solve_fingerprint(
    fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor, *, psnr: float = 35.5, seed: int = 0,
    rounds: int = 3, progress: Callable[[float, str], None] = lambda share, text: None,
) -> None:  # fmt: skip
    """Solves a fingerprint in place.

    Args:
        fingerprint: as `fingerprint_of` made it, with a period.
        module: that holds the convolutions; its weights stay.
        decode: latents (B, ...) to pictures in [-1, 1], by the module.
        latents: (N, ...), of pictures such as the model draws.
        psnr: budget of the change, in dB against the plain decoder's pictures.
        seed: of bits and attacks.
        rounds: how often the pictures are marked with other bits for the fit of the reader.
        progress: called with a share from 0 to 1 and a text.

    Raises:
        UserError: for a fingerprint that a network reads, and for a decoder whose shifts give no pattern.
    """
    reader = fingerprint.reader
    if not isinstance(reader, TileReader) or reader.eye is not None:
        raise UserError("a fingerprint that a network reads has no closed form; train it (train_fingerprint)")
    generator = torch.Generator().manual_seed(seed)
    gain_Tn, cost_nn = _probe(fingerprint, reader, module, decode, latents[:_PROBED], progress)
    tiles = _tiles_of_plain(reader, decode, latents, generator)
    cover_TT = torch.cov(tiles.T.double())
    cover_TT += _COVER_RIDGE * cover_TT.diagonal().mean() * torch.eye(len(cover_TT), dtype=torch.float64)
    keys = _directions(gain_Tn.double(), cost_nn.double(), cover_TT, fingerprint.config.bits + 1)
    if keys is None:
        raise UserError("shifts of these convolutions give no pattern that repeats; choose others (layers)")
    _write(fingerprint, keys.float())
    _to_budget(fingerprint, module, decode, latents[:64], psnr, generator)
    _fit(fingerprint, reader, module, decode, latents, generator, rounds, progress)


def _probe(
    fingerprint: Fingerprint, reader: TileReader, module: nn.Module, decode: Decode, latents: Tensor,
    progress: Callable[[float, str], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mean change (T, n) of the tile, and the cost (n, n) in squared pixels, of unit shifts."""
    widths = {path: outputs for path, (_, outputs) in fingerprint.shapes.items()}
    count = sum(widths.values())
    steps = torch.cat([torch.full((wide,), 0.1) for wide in widths.values()])
    gain, cost = torch.zeros(reader.out.in_features, count), torch.zeros(count, count)
    for number, latent in enumerate(latents):
        progress(
            0.6 * number / len(latents), f"probing {counted(count, 'shift')} on picture {number + 1} of {len(latents)}"
        )
        plain = decode(latent[None]) / 2 + 0.5
        before = _seen(reader, plain).flatten()
        changes = []
        for first in range(0, count, _AT_ONCE):
            chosen = torch.arange(first, min(first + _AT_ONCE, count))
            given = torch.zeros(len(chosen), count)
            given[torch.arange(len(chosen)), chosen] = steps[chosen]
            parts = dict(zip(widths, given.split(list(widths.values()), 1), strict=True))
            with shifting(module, parts):
                marked = decode(latent[None].expand(len(chosen), *latent.shape)) / 2 + 0.5
            gain[:, chosen] += ((_seen(reader, marked).flatten(1) - before) / steps[chosen, None]).T / len(latents)
            changes.append(((marked - plain).flatten(1) / steps[chosen, None]).half())
        change = torch.cat(changes).float()
        cost += change @ change.T / change.shape[1] / len(latents)
    return gain, cost


def _seen(reader: TileReader, pictures: Tensor) -> Tensor:
    """The tile of pictures that were halved and brought back, in grey."""
    grey = (pictures * torch.tensor(_LUMA)[:, None, None]).sum(1, keepdim=True).expand_as(pictures)
    return reader.tile(at_side(scaled(grey, 0.5), reader.side))


def _tiles_of_plain(reader: TileReader, decode: Decode, latents: Tensor, generator: torch.Generator) -> Tensor:
    found = []
    for some in latents.split(32):
        plain = decode(some) / 2 + 0.5
        for part in plain.chunk(4):
            found.append(_seen(reader, _attacked(part, reader.side, generator)[0]).flatten(1))
    return torch.cat(found)


def _directions(gain_Tn: Tensor, cost_nn: Tensor, cover_TT: Tensor, count: int) -> Tensor | None:
    """Shifts (count, n) of equal gain at one cost; None where fewer directions give any gain."""
    cost_nn = cost_nn + _RIDGE * cost_nn.diagonal().mean() * torch.eye(len(cost_nn), dtype=cost_nn.dtype)
    root = torch.linalg.cholesky(cost_nn)
    worth = gain_Tn.T @ torch.linalg.solve(cover_TT, gain_Tn)
    white = torch.linalg.solve_triangular(root, torch.linalg.solve_triangular(root, worth, upper=False).T, upper=False)
    sizes, vectors = torch.linalg.eigh((white + white.T) / 2)
    if len(sizes) < count or float(sizes[-count]) <= 1e-9 * float(sizes[-1]):
        return None
    best = torch.linalg.solve_triangular(root.T, vectors[:, -count:], upper=True)
    # Equal gain after the mix: weaker directions get more of the cost.
    best = best * sizes[-count:].clamp_min(1e-12) ** -0.25
    mix = torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(1), dtype=best.dtype))[0]
    keys = (best @ mix).T
    keys[-1] *= _PRESENCE
    return keys


def _write(fingerprint: Fingerprint, keys: Tensor) -> None:
    widths = [outputs for _, outputs in fingerprint.shapes.values()]
    for table, part in zip(fingerprint.shift.values(), keys.split(widths, 1), strict=True):
        table.copy_(part)


def _to_budget(
    fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor, psnr: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Scales all shifts until pictures change by `psnr` on average; the decoder bends larger ones, so in rounds."""
    bits = torch.randint(2, (len(latents), fingerprint.config.bits), generator=generator).float()
    plain = decode(latents)
    for _ in range(6):
        with fingerprint.modulating(module, bits):
            marked = decode(latents)
        error = ((marked - plain) / 2).square().flatten(1).mean(1)
        ratio = 10 ** ((float(-10 * error.clamp_min(1e-12).log10().mean()) - psnr) / 20)
        for table in fingerprint.shift.values():
            table.mul_(min(max(ratio, 0.1), 10.0))


def _fit(
    fingerprint: Fingerprint, reader: TileReader, module: nn.Module, decode: Decode, latents: Tensor,
    generator: torch.Generator, rounds: int, progress: Callable[[float, str], None],
) -> None:  # fmt: skip
    """Logistic regression of bits and presence on tiles of marked pictures after attacks."""
    tiles, wanted = [], []
    empty = torch.full((fingerprint.config.bits + 1,), 0.5)  # bits of what carries none have no truth
    empty[-1] = 0
    plains = [rounded(decode(some) / 2 + 0.5) for some in latents.split(32)]
    for around in range(rounds):
        progress(0.6 + 0.3 * around / rounds, f"marking pictures, round {around + 1} of {rounds}")
        for some, plain in zip(latents.split(32), plains, strict=True):
            bits = torch.randint(2, (len(some), fingerprint.config.bits), generator=generator).float()
            with fingerprint.modulating(module, bits):
                marked = decode(some) / 2 + 0.5
            for part, own in zip(marked.chunk(4), bits.chunk(4), strict=True):
                attacked, shift = _attacked(part, reader.side, generator)
                tile = reader.tile(attacked)
                tiles.append(torch.roll(tile, (-shift[0], -shift[1]), (2, 3)))
                wanted.append(F.pad(own, (0, 1), value=1.0))
                tiles.append(torch.roll(tile, _other(reader.period, shift, generator), (2, 3)))
                wanted.append(empty.expand(len(own), -1))
            # A plain decoder leaves a pattern of its own at the very same place.
            for part in plain.chunk(2):
                attacked, shift = _attacked(part, reader.side, generator)
                tiles.append(torch.roll(reader.tile(attacked), (-shift[0], -shift[1]), (2, 3)))
                wanted.append(empty.expand(len(part), -1))
    seen, truth = torch.cat(tiles).flatten(1), torch.cat(wanted)
    progress(0.95, f"fitting the reader on {counted(len(seen), 'tile')}")
    _regress(reader.out, seen, truth)


def _attacked(pictures_B3HW: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, tuple[int, int]]:
    """One of the kinds at a random strength, harder than what is measured; and by how much a pattern is shifted."""
    kind = int(torch.randint(4, (), generator=generator))
    amount = float(torch.rand((), generator=generator))
    if kind == 0:
        return rounded(pictures_B3HW), (0, 0)
    if kind == 1:
        return jpeg(pictures_B3HW, int(70 + 20 * amount)), (0, 0)
    if kind == 2:
        return at_side(rounded(scaled(pictures_B3HW, 0.45 + 0.4 * amount)), side), (0, 0)
    down, right = (int(x) for x in torch.randint(9, (2,), generator=generator))
    return jpeg(pictures_B3HW[..., down:, right:], 90), (-down, -right)


def _other(period: int, shift: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
    """A turn of the tile that does not undo its shift."""
    down, right = (int(x) for x in torch.randint(period, (2,), generator=generator))
    undoes = (down + shift[0]) % period == 0 == (right + shift[1]) % period
    return (1 - shift[0], -shift[1]) if undoes else (down, right)


@torch.enable_grad()
def _regress(out: nn.Linear, seen: Tensor, truth: Tensor, decay: float = 1e-4, steps: int = 60) -> None:
    middle, spread = seen.mean(0), seen.std(0).clamp_min(1e-6)
    x = (seen - middle) / spread
    weight = torch.zeros(truth.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(truth.shape[1], requires_grad=True)
    counts = (truth != 0.5).float()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(F.linear(x, weight, bias), truth, reduction="none")
        loss = (losses * counts).sum() / counts.sum() + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        out.weight.copy_(weight / spread)
        out.bias.copy_(bias - (weight / spread) @ middle)
