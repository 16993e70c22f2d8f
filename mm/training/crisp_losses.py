"""The crisp stage: the autoencoder's decoder learns to write sharp pictures; latents stay as they are.

Design choices
- The encoder, the latents' statistics and so the bridge, the trunk and the stem are not touched.
- Half of a batch are encoded renders with a little noise, half are latents that the model itself wrote for the scene
  (`mm.training.redrawn`), since those are what a user sees decoded.
- An error per pixel asks for the mean of all pictures that a latent may stand for, which is blurred. So the error per
  pixel weighs little, and two losses ask for what a mean lacks: a patch discriminator with a hinge loss (PatchGAN,
  Isola et al. 2017, arXiv 1611.07004; in tokenizers, Esser et al. 2021, arXiv 2012.09841), and the local strength of
  edges, wherever exactly they run. Its root mean square alone was met with speckles; its mean stands beside it.
- The feature loss is on the discriminator's own features (feature matching, Wang et al. 2018, arXiv 1711.11585). The
  judge has no part in it.
- The discriminator is conditional: beside a picture it sees what the published decoder makes of the same latents, so
  that it judges the details that were added (as in Isola et al.). It scores patches of two sizes. It is training state,
  not published. Without the condition it stayed at chance for hundreds of steps.
- It learns from encoded renders alone, where the render is what the latents stand for, and judges redrawn ones as well.
- Most patches are plain ground, the same in renders and decoded pictures, so patches weigh by their edges' strength.
- The errors come first: they need no discriminator and cost half. Then it learns alone for a while, and later in more
  steps than the decoder. Where both learned in every step, the decoder outran it and left it at chance, and features
  that are not trained yet were soon matched.
- Its weight is fixed. A weight that keeps the share of its gradient, as Esser et al. have it, amplified what a weak
  discriminator says.
- The decoder may grow: new residual blocks start as the identity, so the first step has the published pictures.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from mm.tokenizers import Autoencoder
from mm.tokenizers.autoencoder import ResidualBlock
from mm.training.latents import read_scenes
from mm.training.tokenizer_data import reconstruction_loss
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
            self.latents.append(load_file(path)["redrawn"])
            self.scenes += read_scenes(path.with_suffix(".jsonl"))

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


class Discriminator(nn.Module):
    """Scores patches (about 20 and 60 pixels wide) of pictures as rendered (above 0) or decoded (below)."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96)) -> None:
        super().__init__()
        half, quarter, eighth = widths
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(24, half, 3, padding=1), nn.LeakyReLU(0.2)),
                nn.Sequential(_conv(half, quarter, stride=2), _conv(quarter, quarter)),
                nn.Sequential(_conv(quarter, eighth, stride=2), _conv(eighth, eighth)),
            ]
        )
        self.scores = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths[1:])

    def forward(
        self, pictures_BCHW: torch.Tensor, before_BCHW: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Scores (B, H, W) of the two scales, and the features of the three stages, for pictures in [-1, 1].

        Args:
            pictures_BCHW: Renders, or decoded pictures.
            before_BCHW: What the published decoder makes of the same latents.
        """
        x_BCHW = torch.cat([pictures_BCHW - before_BCHW, before_BCHW], 1)
        features = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            features.append(x_BCHW)
        return [score(x)[:, 0].float() for score, x in zip(self.scores, features[1:], strict=True)], features


def _conv(wide_in: int, wide_out: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(8, wide_out), nn.LeakyReLU(0.2))


class Crisp(nn.Module):
    """The decoder and its discriminator with their losses; one backward pass serves both."""

    def __init__(self, decoder: nn.Module, config: CrispConfig, discriminator: Discriminator | None = None) -> None:
        super().__init__()
        self.config = config
        self.decoder = decoder
        self.discriminator = discriminator or Discriminator()
        self.passes: torch.Tensor
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, batch: CrispBatch) -> dict[str, torch.Tensor]:
        """Weighted losses: `pixels`, `edges`, `features` and `adversary` are the decoder's, `critic` is not.

        At first there is no discriminator; then it learns alone, and later with the decoder in some of its passes.
        `_sharp`: the gradient energy of the decoded pictures as a share of the renders'.
        """
        config, wanted = self.config, batch.pictures_BCHW
        judged = int(self.passes) - config.adversary_after  # passes with the discriminator so far
        self.passes += 1
        alone = 0 <= judged < config.critic_first or (judged > 0 and judged % config.critic_steps > 0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not alone):
            written = self.decoder(batch.latents_BCHW).float()
        sharp = gradient_energy(written.detach()).mean() / gradient_energy(wanted).mean()
        errors = {
            "pixels": config.pixel_weight * pixel_loss(written, wanted, batch.redrawn_B),
            "edges": config.edge_weight * edge_loss(written, wanted),
        }
        if judged < 0:
            return errors | {"_sharp": sharp}
        critic, known = self._critic(written.detach(), batch)
        if alone:
            return {"critic": critic, "_sharp": sharp}
        with _frozen(self.discriminator):
            scores, features = self.discriminator(written, batch.before_BCHW)
        weights = patch_weights(batch.before_BCHW, scores)
        hinge = -torch.stack([(w * score).mean() for w, score in zip(weights, scores, strict=True)]).mean()
        return errors | {
            "features": config.feature_weight * feature_loss(features, known, batch.redrawn_B),
            "adversary": config.adversary_weight * hinge,
            "critic": critic,
            "_sharp": sharp,
        }

    def _critic(self, written_BCHW: torch.Tensor, batch: CrispBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The discriminator's hinge loss on encoded renders, and its features of all renders."""
        count = int((~batch.redrawn_B).sum())
        both = torch.cat([batch.pictures_BCHW, written_BCHW[:count]])
        before_BCHW = torch.cat([batch.before_BCHW, batch.before_BCHW[:count]])
        scores, features = self.discriminator(both, before_BCHW)
        losses = []
        for weight, score in zip(patch_weights(batch.before_BCHW[:count], scores), scores, strict=True):
            real, made = score[:count], score[-count:]
            losses.append((weight * (F.relu(1 - real) + F.relu(1 + made))).mean())
        return torch.stack(losses).mean(), [feature[: len(written_BCHW)].detach() for feature in features]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients go through the module and not into it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def gradient_energy(pictures_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of neighbouring pixels, across and down, of each picture (B,)."""
    across = pictures_BCHW[..., 1:] - pictures_BCHW[..., :-1]
    down = pictures_BCHW[..., 1:, :] - pictures_BCHW[..., :-1, :]
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))


def pixel_loss(written_BCHW: torch.Tensor, wanted_BCHW: torch.Tensor, redrawn_B: torch.Tensor) -> torch.Tensor:
    """The autoencoder's own reconstruction loss; of redrawn rows on 4 x 4 means, whose details lie elsewhere."""
    total = written_BCHW.new_zeros(())
    for rows, pooled in ((~redrawn_B, 1), (redrawn_B, 4)):
        if bool(rows.any()):
            made, true = (F.avg_pool2d(x[rows], pooled) for x in (written_BCHW, wanted_BCHW))
            total = total + rows.float().mean() * reconstruction_loss(made, true, 0.5)
    return total


def edge_loss(written_BCHW: torch.Tensor, wanted_BCHW: torch.Tensor) -> torch.Tensor:
    """Error of the edges' strength in windows of 4 and 8 pixels: of its root mean square, and of its mean.

    The two together distinguish a few strong edges from many weak ones: speckles have as much energy, and a larger
    mean.
    """
    loss = written_BCHW.new_zeros(())
    made, true = (_edges(x) for x in (written_BCHW, wanted_BCHW))
    for side in (4, 8):
        for moment in (_root_mean_square, F.avg_pool2d):
            loss = loss + (moment(made, side) - moment(true, side)).abs().mean()
    return loss


def _edges(pictures_BCHW: torch.Tensor) -> torch.Tensor:
    """The strength of edges (B, 1, H, W): the gradient's norm over both directions, channels averaged."""
    across = F.pad(pictures_BCHW[..., 1:] - pictures_BCHW[..., :-1], (0, 1))
    down = F.pad(pictures_BCHW[..., 1:, :] - pictures_BCHW[..., :-1, :], (0, 0, 0, 1))
    return ((across.square() + down.square()).mean(1, keepdim=True) + 1e-5).sqrt()


def _root_mean_square(x_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    return F.avg_pool2d(x_BCHW.square(), side).sqrt()


def patch_weights(pictures_BCHW: torch.Tensor, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For scores (B, H, W) of each scale, weights by the strength of edges in their patches; their mean is 1."""
    weights = []
    for score in scores:
        strength = _root_mean_square(_edges(pictures_BCHW), pictures_BCHW.shape[-1] // score.shape[-1])[:, 0]
        weight = strength + 0.1 * strength.mean()
        weights.append(weight / weight.mean())
    return weights


def feature_loss(
    written: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], redrawn_B: torch.Tensor
) -> torch.Tensor:
    """Mean error of features, as a share of their mean size; of redrawn rows on 4 x 4 means of them."""
    losses = []
    for made, true in zip(written, wanted, strict=True):
        size = true.float().abs().mean().clamp_min(1e-3)
        for rows, pooled in ((~redrawn_B, 1), (redrawn_B, 4)):
            if bool(rows.any()):
                pair = [F.avg_pool2d(x[rows].float(), pooled) for x in (made, true)]
                losses.append(rows.float().mean() * (pair[0] - pair[1]).abs().mean() / size)
    return torch.stack(losses).sum() / len(written)


def grown(autoencoder: Autoencoder, config: CrispConfig) -> Autoencoder:
    """The same autoencoder, whose decoder has the depths that `config` asks for; new blocks are the identity."""
    known = dict(autoencoder.config)
    depths = list(known["decoder_depths"])
    depths[2] = depths[2] if config.quarter_depth is None else config.quarter_depth
    refine = known["refine_depth"] if config.refine_depth is None else config.refine_depth
    fresh = Autoencoder(
        **{k: x for k, x in known.items() if not k.startswith("_")} | {"decoder_depths": depths, "refine_depth": refine}
    )
    fresh.encoder.load_state_dict(autoencoder.encoder.state_dict())
    for old, new in zip(_segments(autoencoder.decoder), _segments(fresh.decoder), strict=True):
        if len(new) < len(old):
            raise ValueError(f"a decoder with {len(old)} blocks in a stage cannot shrink to {len(new)}")
        for mine, yours in zip(old, new, strict=False):
            yours.load_state_dict(mine.state_dict())
    return fresh


def _segments(decoder: nn.Module) -> list[list[nn.Module]]:
    """The decoder's modules: each run of residual blocks, and each other module by itself; runs may be empty."""
    out: list[list[nn.Module]] = [[]]
    for module in decoder.children():
        if isinstance(module, ResidualBlock):
            out[-1].append(module)
        else:
            out += [[module], []]
    return out
