"""The drawing stage: trunk, velocity decoder and code head learn to draw from captions.

Design choices
- Flow matching with logit-normal noise levels and the velocity target of diffusers' schedulers; a tenth of the captions
  is dropped for classifier-free guidance. A share of the levels is uniform near pure noise, where the layout is
  decided: logit-normal levels alone put one sample in six hundred above 0.95.
- An alignment loss: a linear readout of a middle layer predicts each cell's object and colour (as REPA, Yu et al. 2024,
  arXiv 2410.06940, but with the renderer's labels as targets). The readout is training state and is not published.
- Codes mode is trained on a share of the steps: MAR's masking (Li et al. 2024, arXiv 2406.11838), and cross-entropy on
  a few masked tokens a picture, since the head is causal over 16 channels and costs as much as the trunk.

Legend: B pictures, C = 16 channels, L = 64 tokens, T text tokens, K = 16 codes a token, N chosen tokens, V levels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mm.models.cache import PromptCache
from mm.models.codes import CodeHead
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder
from mm.tokenizers import Autoencoder, Bridge
from mm.training.latents import LatentCache
from mm.training.preview import judged_preview
from mm.training.publishing import publish_drawing
from mm.training.scene_labels import NounLabels
from mm.training.stage import Stage, StageContext
from mm.world.captions import Detail, caption
from mm.world.render import cell_labels
from mm.world.scene import Scene
from mm.world.vocabulary import ALL_OBJECTS, COLOURS


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """Losses and sampling of the drawing stage.

    Attributes:
        caption_dropout: Share of pictures without a caption.
        partial_captions: Share of captions that leave something out.
        align_layer: The picture layer whose tokens are aligned with the scene.
        align_weight: Of the alignment loss.
        codes_share: Share of the steps in codes mode.
        codes_tokens: Scored tokens a picture in codes mode.
        sigma_mean: Mean of the logit of noise levels.
        sigma_spread: Its standard deviation.
        high_noise_share: Share of levels that are uniform near pure noise.
        high_noise_from: Where that interval begins.
    """

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
    """A batch of the drawing stage.

    Attributes:
        latents_BCHW: Clean latents.
        noise_BCHW: Noise.
        sigma_B: Noise levels.
        ids_BT: Prompts.
        mask_BT: Which tokens of the prompts are real.
        objects_BL: The object of each cell.
        colours_BL: The colour of each cell.
        masked_BL: Which tokens are masked; in codes mode only.
        chosen_BN: Which tokens are scored; in codes mode only.
        weights_BHW: Weights (mean about one) of each latent's velocity loss; None for equal weights.
        nouns: Labels of the prompts' nouns, for grounding losses.
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
    nouns: NounLabels | None = None


def words_for(scenes: Sequence[Scene], rng: random.Random, config: DrawingConfig) -> list[str]:
    """A caption for each scene, in random wording; some dropped, some partial."""
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
    """A batch of either mode; `generator` draws mode, noise, levels and masks."""
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
        """Named losses; names with a leading underscore are only logged."""
        prompt = self.prompt(batch)
        return self._flow(batch, prompt) if batch.masked_BL is None else self._codes(batch, prompt)

    def prompt(self, batch: DrawingBatch) -> PromptCache:
        """The cache of the batch's prompts."""
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


def build_drawing(context: StageContext, settings: DrawingConfig) -> Drawing:
    """The module: fresh, or from published weights."""
    torch.manual_seed(0)
    bridge = context.load(Bridge, "bridge")
    return Drawing(
        context.fresh_or_published(Trunk, "trunk"),
        context.fresh_or_published(VelocityDecoder, "velocity_decoder"),
        context.fresh_or_published(CodeHead, "code_head", order=list(bridge.config.order)),
        bridge,
        settings,
    ).float()


class DrawingBatches:
    """Batches of cached latents with captions."""

    def __init__(self, cache: LatentCache, config: DrawingConfig, batch_size: int, seed: int) -> None:
        self.cache, self.config, self.batch_size, self.seed = cache, config, batch_size, seed
        self.tokenizer = build_text_tokenizer()

    def __call__(self, step: int, process: int = 0) -> DrawingBatch:
        if step % 100 == 0:
            self.cache.refresh()
        rng = random.Random(f"drawing {self.seed} {step} {process}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        latents, scenes = self.cache.draw(self.batch_size, rng)
        words = self.tokenizer(words_for(scenes, rng, self.config), padding=True, return_tensors="pt")
        ids, mask = words.input_ids, words.attention_mask.bool()
        return make_batch(latents, scenes, ids, mask, generator, self.config)


def stage(context: StageContext) -> Stage:
    """The drawing stage, on the state's latents."""
    config, settings = context.trainer_config("drawing"), context.settings(DrawingConfig, "drawing")
    cache = LatentCache(context.state / "latents")

    def evaluate(trainer: Any) -> dict[str, float]:
        publish_drawing(trainer.bare, context.published)
        return judged_preview(trainer, context.load(Autoencoder, "autoencoder"), context.state)

    return Stage(
        name="drawing",
        module=build_drawing(context, settings),
        batches=DrawingBatches(cache, settings, config.batch_size, config.seed),
        evaluate=evaluate,
        config=config,
    )
