"""The drawing stage: trunk, velocity decoder and code head learn to draw the world from captions.

Design choices
- Flow matching with logit-normal noise levels and the velocity target of diffusers' schedulers; a tenth of the captions
  is dropped for guidance. A share of the levels is uniform near pure noise: that is where the layout is decided, and
  logit-normal levels alone put one sample in six hundred above 0.95.
- Features align with the scene instead of with a foreign encoder: a linear readout of a middle layer names each cell's
  object and colour (REPA's idea, Yu et al. 2024, arXiv 2410.06940, with the renderer's truth as teacher). The readout
  is training state and is not published.
- Codes mode learns on a share of the steps: MAR's masking (Li et al. 2024, arXiv 2406.11838), cross-entropy on a few
  masked tokens a picture, since the head is causal over 16 channels and costs as much as the trunk.

This module does not know the loop, files or the judge.
Legend: B pictures, C = 16 channels, L = 64 tokens, K = 16 codes a token, N chosen tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mm.models.cache import PromptCache
from mm.models.codes import CodeHead
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder
from mm.tokenizers import Bridge
from mm.training.grounding import Nouns
from mm.world.captions import Detail, caption
from mm.world.render import cell_labels
from mm.world.scene import Scene
from mm.world.vocabulary import ALL_OBJECTS, COLOURS


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """What the drawing stage learns; the trunk's own sizes are in its model config."""

    caption_dropout: float = 0.1
    partial_captions: float = 0.25
    align_layer: int = 4
    align_weight: float = 0.25
    codes_share: float = 0.0
    codes_tokens: int = 12
    sigma_mean: float = 0.3
    sigma_spread: float = 1.0
    high_noise_share: float = 0.15
    high_noise_from: float = 0.85

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "partial_captions", "codes_share", "high_noise_share", "high_noise_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawingBatch:
    """Clean latents, noise and levels, prompts and cell truth; `codes` batches carry which tokens are masked.

    `weights` (mean about one): how much each latent's velocity counts (default: all the same). `nouns`: the truth of
    the prompts' nouns, where they are grounded.
    """

    latents_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    sigma_B: torch.Tensor
    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    objects_BL: torch.Tensor
    colours_BL: torch.Tensor
    masked_BL: torch.Tensor | None = None
    chosen_BN: torch.Tensor | None = None
    weights_BHW: torch.Tensor | None = None
    nouns: Nouns | None = None


def words_for(scenes: Sequence[Scene], rng: random.Random, config: DrawingConfig) -> list[str]:
    """A caption a scene, in fresh wording; some dropped, some partial."""
    out = []
    for scene in scenes:
        detail: Detail = "partial" if rng.random() < config.partial_captions else "full"
        out.append("" if rng.random() < config.caption_dropout else caption(scene, rng, detail=detail))
    return out


def noise_levels(n: int, generator: torch.Generator, config: DrawingConfig) -> torch.Tensor:
    """Levels (n,) in (0, 1]: logit-normal, and a share uniform between `high_noise_from` and pure noise."""
    usual = torch.sigmoid(config.sigma_mean + config.sigma_spread * torch.randn(n, generator=generator))
    high = 1 - (1 - config.high_noise_from) * torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < config.high_noise_share, high, usual)


def make_batch(
    latents_BCHW: torch.Tensor,
    scenes: Sequence[Scene],
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    generator: torch.Generator,
    config: DrawingConfig,
) -> DrawingBatch:
    """A batch of either mode, drawn by `generator`."""
    batch, cells = len(scenes), latents_BCHW.shape[2] * latents_BCHW.shape[3]
    objects, colours = cell_labels(scenes)
    masked = chosen = None
    if float(torch.rand((), generator=generator)) < config.codes_share:
        order = torch.rand(batch, cells, generator=generator).argsort(1)
        left = (cells * torch.cos(torch.rand(batch, 1, generator=generator) * math.pi / 2)).ceil().clamp_min(1)
        rank = order.argsort(1)
        masked = rank < left
        # Tokens whose codes are scored: the first of the random order, so always masked ones where there are enough.
        chosen = order[:, : config.codes_tokens]
    return DrawingBatch(
        latents_BCHW=latents_BCHW,
        noise_BCHW=torch.randn(latents_BCHW.shape, generator=generator),
        sigma_B=noise_levels(batch, generator, config),
        ids_BT=ids_BT,
        mask_BT=mask_BT,
        objects_BL=objects.flatten(1),
        colours_BL=colours.flatten(1),
        masked_BL=masked,
        chosen_BN=chosen,
    )


class Drawing(nn.Module):
    """The trained parts together, with their losses."""

    def __init__(
        self,
        trunk: Trunk,
        velocity_decoder: VelocityDecoder,
        code_head: CodeHead,
        bridge: Bridge,
        config: DrawingConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.trunk, self.velocity_decoder, self.code_head = trunk, velocity_decoder, code_head
        self.bridge = bridge.requires_grad_(False)
        width = trunk.config.width
        self.readout = nn.Linear(width, len(ALL_OBJECTS) + 1 + len(COLOURS) + 2)

    def forward(self, batch: DrawingBatch) -> dict[str, torch.Tensor]:
        """Named losses; names with a leading underscore are only watched."""
        prompt = self.prompt(batch)
        return self._flow(batch, prompt) if batch.masked_BL is None else self._codes(batch, prompt)

    def prompt(self, batch: DrawingBatch) -> PromptCache:
        """What the batch's pictures read."""
        return self.trunk.encode_text(batch.ids_BT, batch.mask_BT)

    def _flow(self, batch: DrawingBatch, prompt: PromptCache) -> dict[str, torch.Tensor]:
        sigma = batch.sigma_B.view(-1, 1, 1, 1)
        noisy = (1 - sigma) * batch.latents_BCHW + sigma * batch.noise_BCHW
        features, hidden = self.trunk(noisy, batch.sigma_B, prompt, "flow", None, self.config.align_layer)
        velocity = self.velocity_decoder(noisy, batch.sigma_B, features)
        target = batch.noise_BCHW - batch.latents_BCHW
        squares = (velocity.float() - target).square()
        flow = squares.mean() if batch.weights_BHW is None else (squares.mean(1) * batch.weights_BHW).mean()
        return {"flow": flow, "align": self._align(hidden, batch)}

    def _codes(self, batch: DrawingBatch, prompt: PromptCache) -> dict[str, torch.Tensor]:
        assert batch.masked_BL is not None
        assert batch.chosen_BN is not None
        codes_BKL = self.bridge.quantize(batch.latents_BCHW).flatten(2)
        known = self.bridge.dequantize(codes_BKL.view(batch.latents_BCHW.shape))
        features, hidden = self.trunk(
            known, batch.masked_BL.float(), prompt, "codes", batch.masked_BL, self.config.align_layer
        )
        scored_BN = torch.gather(batch.masked_BL, 1, batch.chosen_BN)
        rows = batch.chosen_BN[..., None]
        features_BND = torch.gather(features, 1, rows.expand(-1, -1, features.shape[-1]))
        codes_BNK = torch.gather(codes_BKL.transpose(1, 2), 1, rows.expand(-1, -1, codes_BKL.shape[1]))
        codes_NK = codes_BNK[scored_BN]
        logits_NKV = self.code_head(features_BND[scored_BN], codes_NK)
        loss = F.cross_entropy(logits_NKV.flatten(0, 1).float(), codes_NK.flatten())
        return {"codes": 0.5 * loss, "align": self._align(hidden, batch)}

    def _align(self, hidden_BLD: torch.Tensor, batch: DrawingBatch) -> torch.Tensor:
        objects, colours = self.readout(hidden_BLD).float().split([len(ALL_OBJECTS) + 1, len(COLOURS) + 2], -1)
        loss = F.cross_entropy(objects.flatten(0, 1), batch.objects_BL.flatten())
        loss = loss + F.cross_entropy(colours.flatten(0, 1), batch.colours_BL.flatten())
        return self.config.align_weight * loss
