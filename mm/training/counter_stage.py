"""The counter stage: the connector's counter learns which understanding tokens show objects of one kind.

Design choices
- Its labels are the renderer's groups and nothing else. Trained jointly with text it had all counts right in 5 of 6
  pictures and was biased by the text; trained alone, on the frozen encoder's tokens, in 24 of 25.
- Tokens of two pictures are compared as well where they show different objects, so that pairs of objects that never
  occur together in training are distinguished, too (without it held-out pairs were taken for one kind).
- Tokens of rendered pictures and of noisy latents through the stem alternate, as in the joint stage.
- The encoder costs more than the counter, so blocks of tokens are reused: a step takes a new block and some of the
  latest ones. Which ones depends on the step alone, so that a resumed run uses the same.

Legend: B pictures, S understanding tokens, C channels of merged tokens, N tokens that hold a centre, O objects.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mm.core.errors import UserError
from mm.models.connectors import Connector, SameObjectCounter, merged
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.training.conversations import READ
from mm.training.latents import LatentCache
from mm.training.publishing import publish
from mm.training.readouts import same_kind_loss
from mm.training.scene_labels import same_kind_labels, token_labels
from mm.training.stage import Stage, StageContext
from mm.world.render import render
from mm.world.scene import sample_scene

BLOCK_CACHE = 2000  # a block of 64 pictures is 1.5 MB
COUNTER_KEYS = 32


@dataclass(frozen=True, kw_only=True)
class CounterConfig:
    """Batches of the counter stage.

    Attributes:
        noise: Standard deviation of the noise on latents.
        again: Reused blocks a step.
        window: How many of the latest blocks may be reused.
    """

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
    """Merged tokens, which of them are of one kind, and the object whose centre each holds (-1: none)."""

    merged_BSC: torch.Tensor
    same_kind_BSS: torch.Tensor
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
            tokens = self._encode(self.encoder, render(scenes).float() / 127.5 - 1)
        else:
            latents, scenes = self.cache.draw(self.size, rng)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))
            stem = self.stem
            tokens = self._encode(lambda x: self.encoder.encode_patches(stem(x)), latents + self.config.noise * noise)
        side = self.encoder.config.image_size // self.encoder.config.patch_size
        count = (side // 2) ** 2
        centres_BSO = torch.stack([token_labels(scene, count)[0] for scene in scenes])
        return CounterBatch(
            merged_BSC=merged(tokens, side).half(),
            same_kind_BSS=torch.stack([same_kind_labels(scene, count) for scene in scenes]),
            objects_BS=torch.where(centres_BSO.any(-1), centres_BSO.argmax(-1), -1),
        )

    @torch.no_grad()
    def _encode(
        self, encode: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return encode(x)[1].float()


class Blocks:
    """The batch of a step: a new block and reused ones; `make` makes the block of a number."""

    def __init__(self, make: Callable[[int], CounterBatch], seed: int, config: CounterConfig) -> None:
        self.block = lru_cache(maxsize=config.window + 1)(make)
        self.seed, self.config = seed, config

    def __call__(self, step: int) -> CounterBatch:
        rng = random.Random(f"counter {self.seed} {step}")
        first = max(0, step - self.config.window + 1)
        blocks = [self.block(k) for k in (step, *(rng.randint(first, step) for _ in range(self.config.again)))]
        return CounterBatch(
            merged_BSC=torch.cat([b.merged_BSC for b in blocks]).float(),
            same_kind_BSS=torch.cat([b.same_kind_BSS for b in blocks]),
            objects_BS=torch.cat([b.objects_BS for b in blocks]),
        )


class Counting(nn.Module):
    """The counter with its losses."""

    def __init__(self, counter: SameObjectCounter) -> None:
        super().__init__()
        self.counter = counter

    def forward(self, batch: CounterBatch) -> dict[str, torch.Tensor]:
        """Losses within and between pictures; `_right`: share of pictures with every count right."""
        same_BSS = self.counter(batch.merged_BSC)
        here_BS = batch.same_kind_BSS.sum(-1) > 0
        right_BS = same_BSS.detach().sum(-1).round() == batch.same_kind_BSS.sum(-1)
        return {
            "same_kind": same_kind_loss(same_BSS, batch.same_kind_BSS),
            "different_kinds": batch.same_kind_BSS.shape[1] * self._different(batch),
            "_right": (right_BS | ~here_BS).all(1).float().mean(),
        }

    def _different(self, batch: CounterBatch) -> torch.Tensor:
        """The mean loss of telling different objects apart, over all pictures of the batch."""
        here_BS = batch.objects_BS >= 0
        objects_N = batch.objects_BS[here_BS]
        same_NN = self.counter.same_kind_logits(self.counter.keys(batch.merged_BSC)[0][here_BS])
        apart_NN = objects_N[:, None] != objects_N
        return (F.softplus(same_NN) * apart_NN).sum() / apart_NN.sum().clamp_min(1)


def find_connector(context: StageContext, encoder: UnderstandingEncoder) -> Connector:
    """The state's connector, or a fresh one for the encoder's tokens and the YAML's trunk."""
    folder = context.state / "model" / "understanding_connector"
    if not (folder / "config.json").is_file():
        width = context.config["models"]["trunk"]["width"]
        return Connector(in_channels=encoder.config.width, width=width, counter_keys=COUNTER_KEYS)
    return Connector.from_pretrained(folder)


def stage(context: StageContext) -> Stage:
    """The counter stage, on fresh renders and on the state's latents."""
    config, settings = context.trainer_config("counter"), context.settings(CounterConfig, "counter")
    encoder = context.load(UnderstandingEncoder, "understanding_encoder").float()
    stem = context.load(LatentStem, "latent_stem").float()
    torch.manual_seed(0)
    connector = find_connector(context, encoder).float()
    counter, folder = connector.counter, context.state / "model" / "understanding_connector"
    if counter is None:
        raise UserError(f"{folder} has no counter (counter_keys: 0); remove it to start with a fresh connector")
    maker = BlockMaker(encoder, stem, LatentCache(context.state / "latents"), config.batch_size, settings)
    blocks: dict[int, Blocks] = {}

    def batches(step: int, process: int) -> CounterBatch:
        if process not in blocks:
            seed = config.seed + 1000 * process
            blocks[process] = Blocks(lambda k: maker(k, seed), seed, settings)
        return blocks[process](step)

    def evaluate(_: Any) -> None:
        publish(connector, folder)  # its counter is the trainer's, with averaged weights by now

    return Stage(name="counter", module=Counting(counter), batches=batches, evaluate=evaluate, config=config)
