"""The stem stage: a stem maps latents to the understanding encoder's patch embeddings, by distillation.

Design choices
- The target is what the frozen encoder computes of a rendered picture; the student is what it computes of the same
  picture's latents through the stem. It needs no labels and has a target for every token.
- A little noise on the latents, as in the joint stage, since drawn latents differ a little from encoded ones.
- The error is given as a share of the targets' variance, so that it is the share of the information that is lost.

Legend: B pictures, C latent channels, L = 64 tokens, W width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.training.latents import LatentCache
from mm.training.publishing import publish
from mm.training.stage import Stage, StageContext
from mm.world.render import render
from mm.world.scene import Scene


@dataclass(frozen=True, kw_only=True)
class StemConfig:
    """`noise` is the standard deviation of the noise that is added to latents of unit deviation."""

    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise {self.noise} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class StemBatch:
    """Pictures in [-1, 1] and their latents with noise added."""

    pictures_BCHW: torch.Tensor
    latents_BCHW: torch.Tensor


def make_batch(
    scenes: Sequence[Scene], latents: torch.Tensor, generator: torch.Generator, config: StemConfig
) -> StemBatch:
    """Rendered pictures and the cached latents of the same scenes."""
    noise = config.noise * torch.randn(latents.shape, generator=generator)
    return StemBatch(pictures_BCHW=render(scenes).float() / 127.5 - 1, latents_BCHW=latents + noise)


class Stem(nn.Module):
    """The stem with its loss."""

    def __init__(self, stem: LatentStem, encoder: UnderstandingEncoder) -> None:
        super().__init__()
        self.stem = stem
        # In a list, so that it is not registered: neither trained nor averaged nor saved with the state.
        self._encoder = [encoder.requires_grad_(False).eval()]

    def forward(self, batch: StemBatch) -> dict[str, torch.Tensor]:
        """`lost`: the share of the tokens' variance that the student does not explain."""
        encoder: Any = self._encoder[0]
        encoder = encoder.to(batch.pictures_BCHW.device)
        with torch.no_grad():
            target = encoder(batch.pictures_BCHW)[1].float()
        student = encoder.encode_patches(self.stem(batch.latents_BCHW))[1].float()
        return {"lost": (student - target).square().mean() / target.var()}


def stage(context: StageContext) -> Stage:
    """The stem stage, on the state's latents."""
    config, settings = context.trainer_config("stem"), context.settings(StemConfig, "stem")
    cache = LatentCache(context.state / "latents")
    torch.manual_seed(0)
    stem = context.fresh_or_published(LatentStem, "latent_stem").float()
    encoder = context.load(UnderstandingEncoder, "understanding_encoder").float()

    def batches(step: int, process: int) -> StemBatch:
        rng = random.Random(f"stem {config.seed} {step} {process}")
        latents, scenes = cache.draw(config.batch_size, rng)
        return make_batch(scenes, latents, torch.Generator().manual_seed(rng.getrandbits(62)), settings)

    def evaluate(trainer: Any) -> None:
        publish(trainer.bare.stem, context.state / "model" / "latent_stem")

    return Stage(name="stem", module=Stem(stem, encoder), batches=batches, evaluate=evaluate, config=config)
