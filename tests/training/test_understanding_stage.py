"""The understanding stage: labels from the renderer, and losses that a tiny encoder can lower."""

from __future__ import annotations

import random

import torch

from mm.models.dialogue import IGNORED
from mm.models.text import build_text_tokenizer
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.training import understanding_stage as stage
from mm.world import vocabulary as v
from mm.world.render import cell_labels, centre_labels
from mm.world.scene import Scene, Sprite, sample_scene


def test_no_two_sprites_have_their_centre_in_one_understanding_token():
    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(200)]
    centres = centre_labels(scenes)
    objects, _ = cell_labels(scenes)
    for scene, here, covered in zip(scenes, centres, objects, strict=True):
        assert sorted(here[here > 0].tolist()) == sorted(v.ALL_OBJECTS.index(s.object) + 1 for s in scene.sprites)
        assert (here > 0).view(4, 2, 4, 2).sum((1, 3)).max() == 1  # a token is two by two cells
        assert torch.equal(covered[here > 0], here[here > 0])
    one = Scene(sprites=(Sprite(object="owl", x=72, y=24, size=28),))
    assert centre_labels([one]).nonzero().tolist() == [[0, 1, 4]]


def _batch(n: int) -> stage.UnderstandingBatch:
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(n)]
    words = build_text_tokenizer()(
        stage.captions_for(scenes, rng), padding="max_length", max_length=64, return_tensors="pt"
    )
    return stage.make_batch(scenes, words.input_ids)


def test_a_style_without_ground_asks_for_none():
    sprite = Sprite(object="owl", x=64, y=64, size=52)
    scenes = [Scene(sprites=(sprite,), style="sketch"), Scene(sprites=(sprite,), background="snow")]
    made = stage.make_batch(scenes, torch.zeros(2, 64, dtype=torch.int64))
    assert made.backgrounds_B.tolist() == [IGNORED, v.BACKGROUNDS.index("snow")]
    assert made.styles_B.tolist() == [v.STYLES.index("sketch"), v.STYLES.index("cartoon")]


def test_all_losses_fall_on_a_batch_that_is_seen_again_and_again():
    torch.manual_seed(0)
    encoder = UnderstandingEncoder(width=64, depth=2, heads=4, text_width=32, text_depth=1)
    module = stage.Understanding(encoder, stage.UnderstandingConfig())
    batch, learner = _batch(16), torch.optim.AdamW(module.parameters(), 3e-3)
    first: dict[str, float] = {}
    for _ in range(60):
        losses = module(batch)
        first = first or {k: float(x) for k, x in losses.items()}
        learner.zero_grad()
        torch.stack([x for k, x in losses.items() if not k.startswith("_")]).sum().backward()
        learner.step()
    last = {k: float(x) for k, x in module(batch).items()}
    assert all(last[k] < 0.6 * first[k] for k in ("cells", "centres", "whole")), (first, last)
    assert last["contrast"] < first["contrast"]
    assert last["_right"] > first["_right"]
