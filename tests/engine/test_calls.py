"""What is added to calls of pipelines: sizes that are drawn as asked, and prompts that are read as written."""

from __future__ import annotations

from typing import Any

import pytest
from engine_matrix import drawn
from tiny_pipelines import source_picture, tiny_pipeline_of

from mm.core.errors import UserError
from mm.customization.previews import draw
from mm.engine.engine import Engine
from mm.engine.facts import capabilities_of
from mm.engine.requests import Draw, Edit
from mm.families import family_of


def _engine(name: str) -> Engine:
    pipe = tiny_pipeline_of(name)
    can = capabilities_of(name, pipe, family_of(pipe), None)
    return Engine(pipe, can, name=name, pipeline_for=lambda _: pipe)


@pytest.fixture(scope="module")
def kontext() -> Engine:
    """An engine whose pipeline scales sizes to an area of its own."""
    return _engine("flux-kontext")


@pytest.mark.parametrize("kind", [Draw, Edit])
def test_a_pipeline_with_an_area_of_its_own_draws_the_size(kontext: Engine, kind: type) -> None:
    given: dict[str, Any] = {"prompt": "a fox"}
    if kind is Edit:
        given = {"instruction": "a fox", "image": source_picture()}
    request = kind(**given, size=(48, 32), steps=1, seed=1)
    assert drawn(kontext, request)[0].shape == (32, 48, 3)


def test_an_edit_without_a_size_has_the_proportions_of_its_source(kontext: Engine) -> None:
    area = {"max_area": 64 * 16, "_auto_resize": False}
    request = Edit(instruction="a fox", image=source_picture().resize((96, 24)), steps=1, seed=1, options=area)
    assert drawn(kontext, request)[0].shape == (16, 64, 3)


@pytest.mark.parametrize("name", ["flux-kontext", "flux-fill", "pixart-sigma", "sana", "hunyuan-dit"])
def test_sample_pictures_have_the_size_of_training(name: str) -> None:
    assert draw(tiny_pipeline_of(name), "a fox", side=32, seed=1, steps=2).size == (32, 32)


def test_prompts_are_not_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Beautiful Soup installed, PixArt would take "<mug>" out of a prompt as a tag of HTML."""
    engine, cleaned = _engine("pixart-sigma"), []
    kind = type(engine.pipeline)
    before = kind._text_preprocessing

    def watched(self: Any, text: Any, clean_caption: bool = False) -> Any:
        cleaned.append(clean_caption)
        return before(self, text, clean_caption=False)

    monkeypatch.setattr(kind, "_text_preprocessing", watched)
    drawn(engine, Draw(prompt="a <mug>", size=(32, 32), steps=2, seed=1))
    draw(engine.pipeline, "a <mug>", side=32, seed=1, steps=2)
    assert cleaned and not any(cleaned)


def test_prompts_are_not_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """LongCat-Image would have its text encoder write another prompt, without an adapter's name."""
    engine = _engine("longcat-image")
    monkeypatch.setattr(type(engine.pipeline), "rewire_prompt", lambda *_: pytest.fail("it was rewritten"))
    drawn(engine, Draw(prompt="a <mug>", size=(32, 32), steps=1, seed=1))
    draw(engine.pipeline, "a <mug>", side=32, seed=1, steps=1)


def test_a_schedule_of_one_step_that_there_is_not_is_refused_in_one_line() -> None:
    engine = _engine("mochi")
    with pytest.raises(UserError, match="MochiPipeline has no schedule of one step; give more steps"):
        drawn(engine, Draw(prompt="a fox", size=(32, 32), steps=1, seed=1))


def test_guidance_that_would_have_no_effect_is_refused() -> None:
    """HunyuanImage 2.1 has a guider, and reads a scale where it is distilled alone."""
    engine = _engine("hunyuan-image")
    with pytest.raises(UserError, match="guidance is 7; hunyuan-image has none; leave it out"):
        drawn(engine, Draw(prompt="a fox", size=(32, 32), steps=1, seed=1, guidance=7))
    pipe = engine.pipeline
    pipe.transformer.register_to_config(guidance_embeds=True)
    assert capabilities_of("distilled", pipe, family_of(pipe), None).guidance_name == "distilled_guidance_scale"
