"""Data and losses of the tokenizer stage: rendered scenes in memory, reconstruction and a semantic head.

Design choices
- Scenes are rendered into a pool which grows a little every step; scene i depends on (seed, i) alone, so a resumed run
  draws the same pool. Held-out scenes have seeds of their own. Styles can be favoured: then every other scene is in one
  of them.
- Reconstruction: L1 + MSE + L1 of the image gradient, so that neither blur nor a wrong tone is cheap.
- `SemanticHead` predicts, from *noised* latents (RecTok, arXiv 2512.13421), object and colour of each cell, background
  and style. It makes latents easier to generate and is discarded after training.

Legend: B batch, C channels, H height, W width, N pool.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm.world.render import cell_labels, render
from mm.world.scene import Scene, sample_scene
from mm.world.vocabulary import ALL_OBJECTS, BACKGROUNDS, COLOURS, STYLES


@dataclass(frozen=True, kw_only=True)
class TokenizerBatch:
    """Pictures in [-1, 1] with labels of their cells and of the whole, and the seed of the step's noise."""

    pictures: Tensor
    objects: Tensor
    colours: Tensor
    background: Tensor
    style: Tensor
    noise_seed: int


class ScenePool:
    """Rendered training scenes in memory, as uint8; grows on demand."""

    def __init__(self, seed: int, size: int, favoured: Sequence[str] = ()) -> None:
        self.seed, self.size, self.count, self.favoured = seed, size, 0, favoured
        self.pictures = torch.empty(size, 3, 128, 128, dtype=torch.uint8)
        self.cells = torch.empty(size, 2, 8, 8, dtype=torch.uint8)
        self.globals = torch.empty(size, 2, dtype=torch.uint8)

    def grow_to(self, count: int, chunk: int = 64) -> None:
        """Renders scenes, a chunk at a time, until `count` are there (never more than the size)."""
        count = min(-(-count // chunk) * chunk, self.size)
        while self.count < count:
            stop = min(self.count + chunk, count)
            scenes = [self._scene(i) for i in range(self.count, stop)]
            self.pictures[self.count : stop] = render(scenes)
            self.cells[self.count : stop] = torch.stack(cell_labels(scenes), 1).to(torch.uint8)
            named = [(BACKGROUNDS.index(scene.background), STYLES.index(scene.style)) for scene in scenes]
            self.globals[self.count : stop] = torch.tensor(named, dtype=torch.uint8)
            self.count = stop

    def _scene(self, i: int) -> Scene:
        rng = random.Random(f"tokenizer-{self.seed}-{i}")
        if self.favoured and i % 2:
            return sample_scene(rng, styles=self.favoured)
        return sample_scene(rng)

    def pick(self, batch_size: int, step: int) -> TokenizerBatch:
        """The batch of a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        index = torch.randint(self.count, (batch_size,), generator=generator)
        cells, named = self.cells[index].long(), self.globals[index].long()
        return TokenizerBatch(
            pictures=to_float(self.pictures[index]),
            objects=cells[:, 0],
            colours=cells[:, 1],
            background=named[:, 0],
            style=named[:, 1],
            noise_seed=self.seed * 7_919 + step,
        )


def to_float(pictures_u8: Tensor) -> Tensor:
    """uint8 pictures to [-1, 1], channels last."""
    return (pictures_u8.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def held_out_scenes(style: str, count: int) -> list[Scene]:
    """Scenes in one style that no training pool holds, since their seeds are different."""
    return [replace(sample_scene(random.Random(f"held-out-{style}-{i}")), style=style) for i in range(count)]


class SemanticHead(nn.Module):
    """Predicts object and colour per cell, background and style per picture, from noised latents. Training only."""

    def __init__(self, channels: int, width: int = 96) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.SiLU())
        self.objects = nn.Conv2d(width, len(ALL_OBJECTS) + 1, 1)
        self.colours = nn.Conv2d(width, len(COLOURS) + 2, 1)  # nothing, natural, tints
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.style = nn.Linear(width, len(STYLES))

    def loss(self, latents_BCHW: Tensor, batch: TokenizerBatch) -> Tensor:
        """Cross-entropy of the four predictions."""
        sigma_B111 = torch.rand(len(latents_BCHW), 1, 1, 1, device=latents_BCHW.device) * 0.8
        noised = (1 - sigma_B111) * latents_BCHW + sigma_B111 * torch.randn_like(latents_BCHW)
        features = self.body(noised)
        pooled = features.mean((2, 3))
        return (
            F.cross_entropy(self.objects(features).float(), batch.objects)
            + F.cross_entropy(self.colours(features).float(), batch.colours)
            + F.cross_entropy(self.background(pooled).float(), batch.background)
            + F.cross_entropy(self.style(pooled).float(), batch.style)
        )


def reconstruction_loss(output: Tensor, target: Tensor, edge_weight: float) -> Tensor:
    """L1 + 4 MSE, and L1 of the image gradient with `edge_weight`."""
    error = output.float() - target
    loss = error.abs().mean() + 4 * error.square().mean()
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return loss + edge_weight * (across.abs().mean() + down.abs().mean())
