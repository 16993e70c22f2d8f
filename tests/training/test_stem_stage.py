"""The stem: the encoder reads patches as it reads pictures, and latents learn to be encoded as their pictures."""

from __future__ import annotations

import random

import pytest
import torch

from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.training import stem_stage as stage
from mm.world.scene import sample_scene


@pytest.fixture
def encoder() -> UnderstandingEncoder:
    torch.manual_seed(0)
    return UnderstandingEncoder(width=32, depth=2, heads=2, text_width=16, text_depth=1).eval()


def test_a_pictures_own_patches_are_read_as_the_picture(encoder):
    pictures = torch.rand(3, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        pooled, tokens = encoder(pictures)
        again = encoder.encode_patches(encoder.visual.conv1(pictures))
    torch.testing.assert_close(again[0], pooled)
    torch.testing.assert_close(again[1], tokens)


def test_latents_learn_to_be_encoded_as_their_pictures(encoder):
    """With latents that hold the picture (here: its cells' mean colours) most of what is lost at first is found."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(0)
    scenes = [sample_scene(rng) for _ in range(16)]
    config = stage.StemConfig(noise=0.0)
    pictures = stage.make_batch(scenes, torch.zeros(16, 16, 8, 8), generator, config).pictures_BCHW
    means = torch.nn.functional.avg_pool2d(pictures, 16)
    latents = torch.cat([means, torch.zeros(16, 13, 8, 8)], 1)
    batch = stage.make_batch(scenes, latents, generator, config)
    module = stage.Stem(LatentStem(width=32, depth=1), encoder)
    learner = torch.optim.AdamW(module.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        losses.append(module(batch)["lost"])
        learner.zero_grad()
        losses[-1].backward()
        learner.step()
    assert losses[-1] < 0.4 * losses[0]
    assert all(p.grad is None for p in encoder.parameters())
    assert {name.split(".")[0] for name in module.state_dict()} == {"stem"}


def test_noise_is_added_and_follows_the_generator():
    scenes = [sample_scene(random.Random(2))]
    made = [
        stage.make_batch(scenes, torch.zeros(1, 16, 8, 8), torch.Generator().manual_seed(5), stage.StemConfig(noise=x))
        for x in (0.0, 0.5, 0.5)
    ]
    assert not made[0].latents_BCHW.any()
    assert made[1].latents_BCHW.std() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(made[1].latents_BCHW, made[2].latents_BCHW)


def test_wrong_shapes_are_named(encoder):
    with pytest.raises(ValueError, match=r"latents of shape \(1, 4, 8, 8\); expected \(B, 16"):
        LatentStem(width=32)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"patches of shape \(1, 32, 4, 4\); this encoder reads 32 x 8 x 8"):
        encoder.encode_patches(torch.zeros(1, 32, 4, 4))
    with pytest.raises(ValueError, match="noise -1 must not be negative"):
        stage.StemConfig(noise=-1)
