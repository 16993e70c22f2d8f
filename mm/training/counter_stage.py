"""The counter stage: the connector's counter learns which looks show things of one kind.

Design choices
- Its truth is the renderer's kinship of looks and nothing else. Trained among words it was right of all looks in 5 of 6
  pictures only, and leaned to what words expect; by itself, on the frozen encoder's tokens, in 24 of 25.
- Looks of two pictures are compared as well, where they show different things: things that never meet in training must
  be told apart too (without it the counter took held-out pairs for one kind).
- Tokens of rendered pictures and of noisy latents through the stem come in turn, as in joint training.
- The encoder costs more than the counter, so blocks of tokens are looked at again: a step takes a new block and some
  of the latest ones. Which ones depends on the step alone, so a run that resumes makes them again.

This module does not know the loop, files, words or the trunk.
Legend: B pictures, S looks, C channels of merged tokens, N looks that hold a centre, O objects.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from mm.models.connectors import Alike, merged
from mm.models.understanding import LatentStem, UnderstandingEncoder
from mm.training.grounding import kin_loss, kin_truth, look_truth
from mm.training.latents import LatentCache
from mm.training.talk import READ
from mm.world.render import render
from mm.world.scene import sample_scene

BLOCK_CACHE = 2000  # a block of 64 pictures is 1.5 MB


@dataclass(frozen=True, kw_only=True)
class CounterConfig:
    """What the counter stage learns from: `again` blocks beside the new one, of the latest `window`."""

    noise: float = 0.1
    again: int = 3
    window: int = 1000

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise {self.noise} must not be negative")
        if self.again < 0:
            raise ValueError(f"again {self.again} must not be negative")
        if not 1 <= self.window <= BLOCK_CACHE:
            raise ValueError(f"window {self.window} must lie in [1, {BLOCK_CACHE}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class CounterBatch:
    """Merged tokens, which looks are kin, and which object has its centre in each look (-1: none)."""

    merged_BSC: torch.Tensor
    kin_BSS: torch.Tensor
    objects_BS: torch.Tensor


class BlockMaker:
    """Makes blocks: rendered pictures for even numbers, latents of cached scenes for odd ones."""

    def __init__(
        self,
        encoder: UnderstandingEncoder,
        stem: LatentStem,
        cache: LatentCache,
        size: int,
        config: CounterConfig,
    ) -> None:
        self.encoder, self.stem = (part.requires_grad_(False).eval() for part in (encoder, stem))
        self.cache, self.size, self.config = cache, size, config

    def __call__(self, k: int, seed: int) -> CounterBatch:
        rng = random.Random(f"counter block {seed} {k}")
        if k % 2 == 0:
            scenes = [sample_scene(rng, **READ) for _ in range(self.size)]
            tokens = self._seen(self.encoder, render(scenes).float() / 127.5 - 1)
        else:
            latents, scenes = self.cache.draw(self.size, rng)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
            stem = self.stem
            tokens = self._seen(lambda x: self.encoder.encode_patches(stem(x)), latents + self.config.noise * noise)
        side = self.encoder.config.image_size // self.encoder.config.patch_size
        looks = (side // 2) ** 2
        centres_BSO = torch.stack([look_truth(scene, looks)[0] for scene in scenes])
        return CounterBatch(
            merged_BSC=merged(tokens, side).half(),
            kin_BSS=torch.stack([kin_truth(scene, looks) for scene in scenes]),
            objects_BS=torch.where(centres_BSO.any(-1), centres_BSO.argmax(-1), -1),
        )

    @torch.no_grad()
    def _seen(self, see: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return see(x)[1].float()


class Blocks:
    """The batch of a step, of blocks that `make` makes of their number."""

    def __init__(self, make: Callable[[int], CounterBatch], seed: int, config: CounterConfig) -> None:
        self.block = lru_cache(maxsize=config.window + 1)(make)
        self.seed, self.config = seed, config

    def __call__(self, step: int) -> CounterBatch:
        rng = random.Random(f"counter {self.seed} {step}")
        first = max(0, step - self.config.window + 1)
        blocks = [self.block(k) for k in (step, *(rng.randint(first, step) for _ in range(self.config.again)))]
        return CounterBatch(
            merged_BSC=torch.cat([b.merged_BSC for b in blocks]).float(),
            kin_BSS=torch.cat([b.kin_BSS for b in blocks]),
            objects_BS=torch.cat([b.objects_BS for b in blocks]),
        )


class Counting(nn.Module):
    """The counter with its loss."""

    def __init__(self, counter: Alike) -> None:
        super().__init__()
        self.counter = counter

    def forward(self, batch: CounterBatch) -> dict[str, torch.Tensor]:
        """Losses of kinship and of strangers; `_right`: pictures whose every number is right."""
        kin_BSS = self.counter(batch.merged_BSC)
        here_BS = batch.kin_BSS.sum(-1) > 0
        right_BS = kin_BSS.detach().sum(-1).round() == batch.kin_BSS.sum(-1)
        return {
            "alike": kin_loss(kin_BSS, batch.kin_BSS),
            "strangers": batch.kin_BSS.shape[1] * self._strangers(batch),
            "_right": (right_BS | ~here_BS).all(1).float().mean(),
        }

    def _strangers(self, batch: CounterBatch) -> torch.Tensor:
        """The mean loss of telling apart different things, of all pictures in the batch."""
        here_BS = batch.objects_BS >= 0
        objects_N = batch.objects_BS[here_BS]
        same_NN = self.counter.same(self.counter.keys(batch.merged_BSC)[0][here_BS])
        apart_NN = objects_N[:, None] != objects_N
        return (F.softplus(same_NN) * apart_NN).sum() / apart_NN.sum().clamp_min(1)
