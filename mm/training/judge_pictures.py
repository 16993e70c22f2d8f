"""Training data of the judge: degraded renders, and unreadable pictures.

Design choices
- A ring buffer of renders is refilled a little every step and sampled at random, so that each render is used a few
  times, each time degraded differently: rendering costs a fraction of training.
- Mild degradation (warps, blur, noise, brightness) keeps the labels. A smeared sprite removes that object's label.
  Blends and noise have no labels except "unreadable".
- With a trained autoencoder, part of the ring is encoded and decoded with a little noise in the latents, and decoded
  mixtures and noise are added to the unreadable pictures, since generated pictures fail that way.

Legend: B pictures, S = 6 sprite slots, C channels, H = W = 128. A sprite row is (object or -1, tint index, x, y, size).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mm.world import vocabulary as v
from mm.world.judge import TINTS
from mm.world.render import render
from mm.world.scene import Scene, sample_scene

_CHUNK = 32  # renders at once: fits the cache
_EMPTY_SHARE = 0.02  # scenes without any object
_HELD_OUT_SHARE = 0.15
UNREADABLE_SHARE = 0.18
WRECK_SHARE = 0.12

Reconstruct = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class JudgeBatch:
    """Pictures in [0, 1] with their labels; where `readable_B` is False the other labels are not used."""

    pictures_BCHW: torch.Tensor
    sprites_BS5: torch.Tensor
    background_B: torch.Tensor
    style_B: torch.Tensor
    readable_B: torch.Tensor


def sample_judge_scene(rng: random.Random) -> Scene:
    """A scene for the judge: every object, every style equally often, held-out compositions included."""
    style = rng.choice(v.STYLES)
    if rng.random() < _EMPTY_SHARE:
        background = rng.choice(v.BACKGROUNDS) if v.shows_background(style) else "plain"
        return Scene(sprites=(), background=background, style=style)
    held_out = rng.random() < _HELD_OUT_SHARE
    return sample_scene(rng, objects=v.ALL_OBJECTS, styles=(style,), held_out=held_out)


def truth(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sprite rows (B, S, 5), background and style indices (B,)."""
    sprites_BS5 = torch.full((len(scenes), v.MAX_SPRITES, 5), -1.0)
    for b, scene in enumerate(scenes):
        for i, s in enumerate(scene.sprites):
            row = (v.ALL_OBJECTS.index(s.object), TINTS.index(s.colour), s.x, s.y, s.size)
            sprites_BS5[b, i] = torch.tensor(row, dtype=torch.float32)
    background_B = torch.tensor([v.BACKGROUNDS.index(s.background) for s in scenes])
    return sprites_BS5, background_B, torch.tensor([v.STYLES.index(s.style) for s in scenes])


class Ring:
    """A ring buffer of renders with their labels."""

    def __init__(self, capacity: int, seed: object) -> None:
        self.pictures_NCHW = torch.empty(capacity, 3, v.SIZE, v.SIZE, dtype=torch.uint8)
        self.sprites_NS5 = torch.empty(capacity, v.MAX_SPRITES, 5)
        self.background_N = torch.empty(capacity, dtype=torch.int64)
        self.style_N = torch.empty(capacity, dtype=torch.int64)
        self.decoded_NCHW = torch.empty(0, 3, v.SIZE, v.SIZE)  # unreadable pictures that an autoencoder decoded
        self.seed = seed
        self.filled = self.written = 0

    def refill(self, count: int, reconstruct: Reconstruct | None = None, share: float = 0.5) -> None:
        """Renders `count` fresh scenes over the oldest ones; a `share` of them goes through `reconstruct`."""
        rng = random.Random(f"judge training {self.seed} {self.written}")
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        for start in range(0, count, _CHUNK):
            scenes = [sample_judge_scene(rng) for _ in range(min(_CHUNK, count - start))]
            pictures = render(scenes)
            part = round(share * len(scenes)) if reconstruct is not None else 0
            if reconstruct is not None and part:
                pictures[:part] = reconstruct(pictures[:part], generator)
            capacity = len(self.pictures_NCHW)
            rows = torch.arange(self.written, self.written + len(scenes)) % capacity
            self.pictures_NCHW[rows] = pictures
            self.sprites_NS5[rows], self.background_N[rows], self.style_N[rows] = truth(scenes)
            self.written += len(scenes)
            self.filled = min(capacity, self.filled + len(scenes))

    def add_decoded(self, pictures_BCHW: torch.Tensor, keep: int = 512) -> None:
        """Adds pictures in [0, 1] that count as unreadable; the newest `keep` stay."""
        self.decoded_NCHW = torch.cat([self.decoded_NCHW, pictures_BCHW])[-keep:]

    def draw(self, count: int, generator: torch.Generator) -> JudgeBatch:
        """A damaged batch."""
        rows = torch.randint(self.filled, (count,), generator=generator)
        clean_BCHW = self.pictures_NCHW[rows].float() / 255
        pictures, sprites = warp(clean_BCHW, self.sprites_NS5[rows], generator)
        pictures, sprites = wreck(pictures, sprites, generator)
        pictures = soften(pictures, generator)
        broken = int(UNREADABLE_SHARE * count)
        garbage = spoil(clean_BCHW, broken, self.decoded_NCHW, generator)
        pictures = torch.cat([garbage, shade(pictures[broken:], generator)])
        return JudgeBatch(
            pictures_BCHW=pictures,
            sprites_BS5=sprites,
            background_B=self.background_N[rows],
            style_B=self.style_N[rows],
            readable_B=torch.arange(count) >= broken,
        )


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def warp(
    pictures_BCHW: torch.Tensor, sprites_BS5: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Small turns, stretches and shifts with a gentle wobble; labels move along. A third stays as it is."""
    n, half = len(pictures_BCHW), v.SIZE / 2
    moves = (torch.rand(n, generator=generator) > 0.33).float()
    angle = _uniform(-0.07, 0.07, (n,), generator) * moves
    zoom_B2 = 1 + _uniform(-0.06, 0.06, (n, 2), generator) * moves[:, None]
    shift_B2 = _uniform(-3.0, 3.0, (n, 2), generator) * moves[:, None]
    turn_B22 = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    source_B22 = turn_B22 * zoom_B2[:, None, :]  # where a pixel comes from, about the middle
    theta = torch.cat([source_B22, (shift_B2 / half)[:, :, None]], 2)
    grid = F.affine_grid(theta, list(pictures_BCHW.shape), align_corners=False)
    wobble = torch.randn(n, 2, 5, 5, generator=generator) * (moves * 0.8 / half).view(n, 1, 1, 1)
    wobble = F.interpolate(wobble, size=(v.SIZE, v.SIZE), mode="bicubic")
    moved = F.grid_sample(pictures_BCHW, grid + wobble.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    sprites = sprites_BS5.clone()
    offset_BS2 = sprites[..., 2:4] - half - shift_B2[:, None]
    sprites[..., 2:4] = torch.linalg.solve(source_B22, offset_BS2.mT).mT + half
    sprites[..., 4] /= zoom_B2.mean(1, keepdim=True)
    return moved, sprites


def wreck(
    pictures_BCHW: torch.Tensor, sprites_BS5: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smears or warps the first sprite of some pictures, and removes its label."""
    n = len(pictures_BCHW)
    rows = torch.nonzero((torch.rand(n, generator=generator) < WRECK_SHARE) & (sprites_BS5[:, 0, 0] >= 0)).flatten()
    if not len(rows):
        return pictures_BCHW, sprites_BS5
    x, y, size = sprites_BS5[rows, 0, 2:].unbind(1)
    pixels = torch.arange(v.SIZE) + 0.5
    reach = (size / 2).view(-1, 1)
    inside = [torch.sigmoid((reach - (pixels - c[:, None]).abs()) / 1.5) for c in (y, x)]
    mask = (inside[0][:, :, None] * inside[1][:, None, :])[:, None]
    own = pictures_BCHW[rows]
    smeared = F.interpolate(F.avg_pool2d(own, 16), size=(v.SIZE, v.SIZE), mode="bilinear")
    melted = melt(own, generator)
    smears = (torch.rand(len(rows), generator=generator) < 0.5).view(-1, 1, 1, 1)
    pictures, sprites = pictures_BCHW.clone(), sprites_BS5.clone()
    pictures[rows] = own + mask * (torch.where(smears, smeared, melted) - own)
    sprites[rows, 0, 0] = -1
    return pictures, sprites


def melt(pictures_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures under a strong random warp, as an undertrained generator draws them."""
    n = len(pictures_BCHW)
    run = torch.randn(n, 2, 14, 14, generator=generator) * (7 / (v.SIZE / 2))
    run = F.interpolate(run, size=(v.SIZE, v.SIZE), mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(pictures_BCHW.shape), align_corners=False)
    return F.grid_sample(pictures_BCHW, grid + run, padding_mode="reflection", align_corners=False)


def soften(pictures_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A quarter of the pictures through half resolution, a quarter through a light blur."""
    quarter = len(pictures_BCHW) // 4
    order = torch.randperm(len(pictures_BCHW), generator=generator)
    halved, blurred = order[:quarter], order[quarter : 2 * quarter]
    out = pictures_BCHW.clone()
    small = F.interpolate(pictures_BCHW[halved], scale_factor=0.5, mode="bilinear", antialias=True)
    out[halved] = F.interpolate(small, size=(v.SIZE, v.SIZE), mode="bicubic").clamp(0, 1)
    soft = F.avg_pool2d(F.pad(pictures_BCHW[blurred], (1, 1, 1, 1), mode="replicate"), 3, 1)
    much = _uniform(0.2, 1.0, (len(blurred), 1, 1, 1), generator)
    out[blurred] = torch.lerp(pictures_BCHW[blurred], soft, much)
    return out


def shade(pictures_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast and white balance off by a few per cent; noise in half of the pictures."""
    n = len(pictures_BCHW)
    gain = _uniform(0.94, 1.06, (n, 1, 1, 1), generator) * _uniform(0.98, 1.02, (n, 3, 1, 1), generator)
    lift = _uniform(-0.03, 0.03, (n, 1, 1, 1), generator)
    deviation = _uniform(-0.06, 0.06, (n, 1, 1, 1), generator).clamp_min(0)
    noise = torch.randn(pictures_BCHW.shape, generator=generator) * deviation
    return ((pictures_BCHW - 0.5) * gain + 0.5 + lift + noise).clamp(0, 1)


def spoil(clean_BCHW: torch.Tensor, count: int, decoded_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`count` unreadable pictures: blends for the greater part, else one of the kinds below."""
    kinds = [_shuffled, _melted, _smeared, _noisy, _faint, _negative, _one_channel, _nothing]
    out = []
    for _ in range(count):
        a, b = clean_BCHW[torch.randint(len(clean_BCHW), (2,), generator=generator)]
        pick = float(torch.rand((), generator=generator))
        if pick < 0.4:
            out.append(torch.lerp(a, b, float(_uniform(0.3, 0.7, (), generator))))
        elif pick < 0.65 and len(decoded_NCHW):
            out.append(decoded_NCHW[int(torch.randint(len(decoded_NCHW), (), generator=generator))])
        else:
            kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
            out.append(kind(a, generator).clamp(0, 1))
    return torch.stack(out) if out else clean_BCHW[:0]


def _shuffled(picture_CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    side = (8, 16, 32)[int(torch.randint(3, (), generator=generator))]
    patches = F.unfold(picture_CHW[None], side, stride=side)
    patches = patches[..., torch.randperm(patches.shape[-1], generator=generator)]
    return F.fold(patches, (v.SIZE, v.SIZE), side, stride=side)[0]


def _melted(picture_CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return melt(picture_CHW[None], generator)[0]


def _smeared(picture_CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    side = (16, 32)[int(torch.randint(2, (), generator=generator))]
    return F.interpolate(F.avg_pool2d(picture_CHW[None], side), size=(v.SIZE, v.SIZE), mode="bicubic")[0]


def _noisy(picture_CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    keep = float(_uniform(0.0, 0.6, (), generator))
    grain = 2 ** int(torch.randint(5, (), generator=generator))
    noise = torch.rand(1, 3, v.SIZE // grain, v.SIZE // grain, generator=generator)
    return keep * picture_CHW + (1 - keep) * F.interpolate(noise, size=(v.SIZE, v.SIZE), mode="bilinear")[0]


def _faint(picture_CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    level = torch.rand(3, 1, 1, generator=generator)
    return level + (picture_CHW - picture_CHW.mean()) * float(_uniform(0.02, 0.12, (), generator))


def _negative(picture_CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (0.5 - picture_CHW) * float(_uniform(0.8, 3.0, (), generator)) + 0.5


def _one_channel(picture_CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    kept = torch.zeros(3, 1, 1)
    kept[int(torch.randint(3, (), generator=generator))] = 1
    return picture_CHW * kept


def _nothing(picture_CHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    ends = torch.rand(3, 2, 1, generator=generator)
    if float(torch.rand((), generator=generator)) < 0.5:
        ends = ends[:, :1].expand(3, 2, 1)
    return F.interpolate(ends[None], size=(v.SIZE, v.SIZE), mode="bilinear")[0]
