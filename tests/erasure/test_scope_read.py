"""What a model with an erasure says of the concept in a picture: it names it by default, and not with scope "read"."""

from __future__ import annotations

import pytest
from tiny import tiny_pipeline
from tiny_pipelines import tiny_pipeline_of

import mm
from mm.core.errors import UserError
from mm.evaluation.understand import to_pictures
from mm.pipelines.answers import DESCRIBE
from mm.world.scene import Scene, Sprite


def test_a_model_names_what_it_no_longer_draws_unless_reading_is_erased_too():
    reader = mm.UnderstandingPipeline.from_pretrained("mm-tiny")
    drawer = mm.TextToImagePipeline.from_pretrained("mm-tiny")
    drawer.register_modules(trunk=reader.trunk)
    animals = ("wolf", "cat")
    scenes = [Scene(sprites=(Sprite(object=n, x=64, y=64, size=60),), background="plain") for n in animals]
    wolf, cat = to_pictures(scenes)

    def says(picture):
        return reader(picture, [DESCRIBE]).answers[0]

    before = says(wolf), says(cat)
    assert "wolf" in before[0]
    assert "cat" in before[1]
    drawing = mm.erase(drawer, "wolf", anchors="rabbit")
    assert {e.kind for e in drawing.entries.values()} == {"lowrank"}
    drawing.apply(drawer)
    assert (says(wolf), says(cat)) == before  # the text-reading layers of pictures are no part of reading
    drawing.undo(drawer)
    reading = mm.erase(drawer, "wolf", anchors="rabbit", scope="read")
    reading.apply(drawer)
    assert "wolf" not in says(wolf)
    assert says(cat) == before[1]
    reading.undo(drawer)
    assert (says(wolf), says(cat)) == before


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_pipeline, {"scope": "all"}, "scope is 'all'; give draw or read"),
        (tiny_pipeline, {"scope": "read"}, "leave scope at 'draw'"),
        (lambda: tiny_pipeline_of("stable-diffusion"), {"scope": "read", "anchors": "dog"}, "leave scope at 'draw'"),
    ],
)
def test_models_that_do_not_read(make, options, message):
    with pytest.raises(UserError, match=message):
        mm.erase(make(), "cat", **options)
