"""The zero-shot judge on the embedded open_clip model, with true renders of the world."""

from __future__ import annotations

import pytest

from mm.core.errors import UserError
from mm.erasure.open_clip_judge import OpenClipJudge
from mm.evaluation.understand import to_pictures
from mm.world.scene import Scene, Sprite

NAMES = ("cat", "car", "house", "star", "apple", "owl")


@pytest.fixture(scope="module")
def judge():
    return OpenClipJudge(
        {"objects": NAMES}, "mm-tiny-vit", "mm", templates={"objects": "a {}"}, unreadable=(), threshold=0.5
    )


def test_renders_are_named(judge):
    scenes = [Scene(sprites=(Sprite(object=n, x=64, y=64, size=60),), background="plain") for n in NAMES]
    found = judge(to_pictures(scenes))
    right = sum(name in labels for name, labels in zip(NAMES, found, strict=True))
    assert right >= 5
    assert all(len(labels) <= 1 for labels in found)  # the names of a group compete


def test_pictures_nearest_to_an_unreadable_text_have_no_labels(judge):
    scenes = [Scene(sprites=(Sprite(object=n, x=64, y=64, size=60),), background="plain") for n in ("cat", "car")]
    other = OpenClipJudge(
        {"objects": ("house",)}, "mm-tiny-vit", "mm", templates={"objects": "a {}"}, unreadable=("a cat",)
    )
    found = other(to_pictures(scenes))
    assert found[0] is None
    assert found[1] is not None


def test_a_judge_without_names():
    with pytest.raises(UserError, match="no names"):
        OpenClipJudge({"objects": ()}, "mm-tiny-vit", "mm")
