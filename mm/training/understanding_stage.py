"""The understanding stage: a small ViT learns from pictures and captions.

Design choices
- No picture is used twice: an encoder that saw 41 thousand pictures nine times each overfitted. Scenes are sampled as
  for the joint stage's reading, with crowds and counts.
- CLIP's symmetric contrastive loss (Radford et al. 2021, arXiv 2103.00020) through open_clip's `ClipLoss`. Captions are
  full ones, so that two pictures of a batch rarely have the same.
- Dense labels from the renderer: linear readouts of each token predict its cell's object and colour, and whose centre
  is in it, which a pooled vector hardly encodes. A readout of the mean token predicts style and background. Readouts
  are training state and are not published.

Legend: B pictures, T words, L = 64 tokens, W width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mm.models.dialogue import IGNORED
from mm.models.text import build_text_tokenizer
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.training.conversations import READ
from mm.training.publishing import publish
from mm.training.stage import Stage, StageContext
from mm.world import vocabulary as v
from mm.world.captions import caption
from mm.world.render import cell_labels, centre_labels, render
from mm.world.scene import Scene, sample_scene
from mm.world.vocabulary import ALL_OBJECTS, COLOURS


@dataclass(frozen=True, kw_only=True)
class UnderstandingConfig:
    """Weights of the losses: contrastive, and of the readouts of cells, centres and the whole picture."""

    contrast_weight: float = 0.5
    cells_weight: float = 1.0
    centres_weight: float = 1.0
    whole_weight: float = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class UnderstandingBatch:
    """Pictures in [-1, 1], captions padded with 0 to the context length, and labels of cells and pictures."""

    pictures_BCHW: torch.Tensor
    ids_BT: torch.Tensor
    objects_BL: torch.Tensor
    colours_BL: torch.Tensor
    centres_BL: torch.Tensor
    styles_B: torch.Tensor
    backgrounds_B: torch.Tensor


def captions_for(scenes: Sequence[Scene], rng: random.Random) -> list[str]:
    """A full caption for each scene."""
    return [caption(scene, rng) for scene in scenes]


def make_batch(scenes: Sequence[Scene], ids_BT: torch.Tensor, device: torch.device | str = "cpu") -> UnderstandingBatch:
    """Renders a batch and labels it."""
    objects, colours = cell_labels(scenes)
    grounds = [v.BACKGROUNDS.index(s.background) if v.shows_background(s.style) else IGNORED for s in scenes]
    return UnderstandingBatch(
        pictures_BCHW=render(scenes, str(device)).float() / 127.5 - 1,
        ids_BT=ids_BT,
        objects_BL=objects.flatten(1),
        colours_BL=colours.flatten(1),
        centres_BL=centre_labels(scenes).flatten(1),
        styles_B=torch.tensor([v.STYLES.index(s.style) for s in scenes]),
        backgrounds_B=torch.tensor(grounds),
    )


class Understanding(nn.Module):
    """The encoder with its losses."""

    def __init__(self, encoder: UnderstandingEncoder, config: UnderstandingConfig) -> None:
        super().__init__()
        from open_clip.loss import ClipLoss

        self.config, self.encoder = config, encoder
        self.readout = nn.Linear(encoder.config.width, len(ALL_OBJECTS) + 1 + len(COLOURS) + 2)
        self.readout_centres = nn.Linear(encoder.config.width, len(ALL_OBJECTS) + 1)
        self.readout_whole = nn.Linear(encoder.config.width, len(v.STYLES) + len(v.BACKGROUNDS))
        self.loss = ClipLoss()
        # Few cells hold a centre.
        weights = torch.ones(len(ALL_OBJECTS) + 1)
        weights[0] = 0.2
        self.register_buffer("rarity", weights, persistent=False)
        self.rarity: torch.Tensor

    def forward(self, batch: UnderstandingBatch) -> dict[str, torch.Tensor]:
        """Named losses; names with a leading underscore are only logged."""
        pooled, tokens = self.encoder(batch.pictures_BCHW)
        words = self.encoder.encode_text(batch.ids_BT)
        scale = self.encoder.logit_scale.clamp(max=4.6).exp()  # 100, as in CLIP
        sides = (F.normalize(x.float(), dim=-1) for x in (pooled, words))
        contrast = self.loss(*sides, scale)
        objects, colours = self.readout(tokens).float().split([len(ALL_OBJECTS) + 1, len(COLOURS) + 2], -1)
        cells = F.cross_entropy(objects.flatten(0, 1), batch.objects_BL.flatten())
        cells = cells + F.cross_entropy(colours.flatten(0, 1), batch.colours_BL.flatten())
        centres = self.readout_centres(tokens).float().flatten(0, 1)
        centred = F.cross_entropy(centres, batch.centres_BL.flatten(), self.rarity)
        right = (objects.argmax(-1) == batch.objects_BL)[batch.objects_BL > 0].float().mean()
        found = (centres.argmax(-1) == batch.centres_BL.flatten()).view(len(pooled), -1).all(1).float().mean()
        return {
            "contrast": self.config.contrast_weight * contrast,
            "cells": self.config.cells_weight * cells,
            "centres": self.config.centres_weight * centred,
            "whole": self.config.whole_weight * self._whole(tokens, batch),
            "_right": right,
            "_found": found,  # share of pictures with every centre right
        }

    def _whole(self, tokens: torch.Tensor, batch: UnderstandingBatch) -> torch.Tensor:
        styles, grounds = self.readout_whole(tokens.mean(1)).float().split([len(v.STYLES), len(v.BACKGROUNDS)], -1)
        loss = F.cross_entropy(styles, batch.styles_B)
        return loss + F.cross_entropy(grounds, batch.backgrounds_B, ignore_index=IGNORED, reduction="sum") / len(
            grounds
        )


def stage(context: StageContext) -> Stage:
    """The understanding stage, on fresh renders."""
    config = context.trainer_config("understanding")
    torch.manual_seed(0)
    encoder = context.fresh_or_published(UnderstandingEncoder, "understanding_encoder").float()
    tokenizer, length = build_text_tokenizer(), encoder.config.context_length

    def batches(step: int, process: int) -> UnderstandingBatch:
        rng = random.Random(f"understanding {config.seed} {step} {process}")
        scenes = [sample_scene(rng, **READ) for _ in range(config.batch_size)]
        words = tokenizer(captions_for(scenes, rng), padding="max_length", max_length=length, return_tensors="pt")
        return make_batch(scenes, words.input_ids)

    def evaluate(trainer: Any) -> None:
        publish(trainer.bare.encoder, context.state / "model" / "understanding_encoder")

    module = Understanding(encoder, context.settings(UnderstandingConfig, "understanding"))
    return Stage(name="understanding", module=module, batches=batches, evaluate=evaluate, config=config)
