"""Unlearning on the picture side: only picture layers change, and the target's text draws nearer to the anchor's."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import draw, tiny_pipeline

import mm
from mm.adapters import Patch
from mm.erasure.concepts import parse
from mm.erasure.erase import PAIRS
from mm.erasure.gradients import predict
from mm.erasure.methods.unlearning import picture_layers
from mm.world.concepts import WorldContexts

QUICK = {
    "rounds": 0, "attacked": 2, "iterations": 1, "picture_steps": 120, "picture_rate": 5e-4, "pool": 1, "batch": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(codes=False)


@pytest.fixture(scope="module")
def patch(pipe):
    return mm.erase(pipe, ["cat"], anchors="dog", method="robust", **QUICK)


def test_picture_layers_are_those_that_read_no_text(pipe):
    found = picture_layers(pipe)
    assert found
    assert all("picture_layers" in path or path.startswith("velocity_decoder") for path in found)


def test_the_old_text_draws_nearer_to_the_anchor(pipe, patch):
    """With the picture side alone on the model, text features are the unchanged ones."""
    side = Patch(entries={p: patch.entries[p] for p in picture_layers(pipe)}, base=patch.base, name="picture side")
    assert len(side.entries) < len(patch.entries)
    pairs = random.Random(0).sample(WorldContexts().pairs(parse("cat"), "dog", PAIRS), QUICK["batch"])
    targets, anchors = map(list, zip(*pairs, strict=True))
    old, wanted, before = predict(pipe, targets), predict(pipe, anchors), draw(pipe)
    side.apply(pipe)
    new = predict(pipe, targets)
    side.undo(pipe)
    assert torch.equal(draw(pipe), before)
    assert (new - wanted).square().sum() < 0.3 * (old - wanted).square().sum()


def test_the_report_says_what_was_trained(pipe, patch):
    facts = patch.report["unlearning"]
    assert facts["layers"] == len(picture_layers(pipe))
    assert facts["last_loss"] < 0.3 * facts["first_loss"]
    plain = mm.erase(pipe, ["cat"], anchors="dog", method="robust", **{**QUICK, "picture_steps": 0})
    assert "unlearning" not in plain.report
