"""Batches of the crisp stage: encoded renders, and latents that the model itself wrote, with the pictures wanted.

Half of a batch are encoded renders with a little noise, half are latents that the model wrote for a scene
(`mm.training.redrawn`), since those are what a user sees decoded.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from mm.tokenizers import Autoencoder
from mm.training.latents import read_shard, scene_from_json
from mm.world.render import render
from mm.world.scene import Scene, sample_scene


@dataclass(frozen=True, kw_only=True)
class CrispConfig:
    """Weights of the losses, the share of redrawn latents, and how the decoder grows.

    Attributes:
        redrawn_share: Share of a batch whose latents the model wrote; 0 needs no shards.
        noise: Largest deviation of the noise on encoded latents.
        pixel_weight: Of the error per pixel; of redrawn pictures, of 4 x 4 means.
        edge_weight: Of the error of edges' local strength.
        feature_weight: Of the error of the discriminator's features.
        adversary_weight: Of the hinge loss that the discriminator gives the decoder.
        adversary_after: Steps at first in which the decoder learns without the discriminator.
        critic_first: Steps after those in which the discriminator learns alone.
        critic_steps: From then on the decoder learns in one of so many steps, the discriminator in all.
        decoder_rate: The decoder's learning rate as a share of the discriminator's.
        quarter_depth: Residual blocks at a quarter of the side; None keeps the decoder's own number.
        refine_depth: Residual blocks at half of the side; None keeps the decoder's own number.
    """

    redrawn_share: float = 0.5
    noise: float = 0.12
    pixel_weight: float = 1.0
    edge_weight: float = 2.5
    feature_weight: float = 0.02
    adversary_weight: float = 0.02
    adversary_after: int = 300
    critic_first: int = 80
    critic_steps: int = 2
    decoder_rate: float = 0.3
    quarter_depth: int | None = None
    refine_depth: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.redrawn_share <= 1:
            raise ValueError(f"redrawn_share {self.redrawn_share} must lie in [0, 1]")
        weights = ("pixel_weight", "edge_weight", "feature_weight", "adversary_weight")
        for name in ("noise", *weights, "adversary_after", "critic_first"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.critic_steps < 1:
            raise ValueError(f"critic_steps {self.critic_steps} must be 1 or more")
        if self.decoder_rate <= 0:
            raise ValueError(f"decoder_rate {self.decoder_rate} must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class CrispBatch:
    """Latents to decode, the renders they stand for in [-1, 1], what the published decoder makes of them, and which
    rows are redrawn (the last ones).
    """

    latents_BCHW: torch.Tensor
    pictures_BCHW: torch.Tensor
    before_BCHW: torch.Tensor
    redrawn_B: torch.Tensor


class RedrawnPool:
    """Redrawn latents and their scenes, of the shards in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.latents: list[torch.Tensor] = []
        self.scenes: list[Scene] = []
        self.refresh()
        if not self.scenes:
            raise FileNotFoundError(f"no redrawn latents in {folder}; write some with write_redrawn first")

    def refresh(self) -> None:
        """Takes in shards that have appeared, in order."""
        while (path := self.folder / f"{len(self.latents):05d}.safetensors").is_file():
            (latents,), scenes = read_shard(path, ("redrawn",), scene_from_json)
            self.latents.append(latents)
            self.scenes += scenes

    def draw(self, n: int, rng: random.Random) -> tuple[torch.Tensor, list[Scene]]:
        """`n` random latents (n, C, H, W) in fp32, and their scenes."""
        spots = [rng.randrange(len(self.scenes)) for _ in range(n)]
        parts = [divmod(spot, len(self.latents[0])) for spot in spots]
        return torch.stack([self.latents[k][i] for k, i in parts]).float(), [self.scenes[spot] for spot in spots]


class BatchMaker:
    """Makes the batch of a step: fresh renders, encoded, and redrawn latents with their scenes rendered."""

    def __init__(self, autoencoder: Autoencoder, pool: RedrawnPool | None, size: int, config: CrispConfig) -> None:
        if config.redrawn_share and pool is None:
            raise ValueError(f"redrawn_share is {config.redrawn_share} and there is no pool of redrawn latents")
        self.autoencoder, self.pool, self.size, self.config = autoencoder, pool, size, config

    @torch.no_grad()
    def __call__(self, rng: random.Random) -> CrispBatch:
        again = round(self.size * self.config.redrawn_share)
        scenes = [sample_scene(rng, default_weight=8) for _ in range(self.size - again)]
        fresh_BCHW = render(scenes).float() / 127.5 - 1
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        latents_BCHW = self.autoencoder.encode(fresh_BCHW).float()
        level_B111 = self.config.noise * torch.rand(len(scenes), 1, 1, 1, generator=generator)
        latents_BCHW = latents_BCHW + level_B111 * torch.randn(latents_BCHW.shape, generator=generator)
        pictures_BCHW = fresh_BCHW
        if again and self.pool is not None:
            redrawn_BCHW, known = self.pool.draw(again, rng)
            latents_BCHW = torch.cat([latents_BCHW, redrawn_BCHW])
            pictures_BCHW = torch.cat([fresh_BCHW, render(known).float() / 127.5 - 1])
        with torch.autocast("cpu", torch.bfloat16):
            before_BCHW = self.autoencoder.decode(latents_BCHW).float()
        return CrispBatch(
            latents_BCHW=latents_BCHW.contiguous(memory_format=torch.channels_last),
            pictures_BCHW=pictures_BCHW.contiguous(memory_format=torch.channels_last),
            before_BCHW=before_BCHW.contiguous(memory_format=torch.channels_last),
            redrawn_B=torch.arange(self.size) >= self.size - again,
        )
