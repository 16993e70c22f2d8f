"""Pictures from outside: photographs are found, renders and own drawings are not, and every entry says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from PIL import Image

import mm
from mm.evaluation.outside import crops, fit, halves, mean_tokens, measure, photographs, rendered
from mm.models.connectors import Connector
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.world.render import render
from mm.world.scene import Scene, Sprite

pytest.importorskip("skimage", reason="the photographs are part of the dev extra")
pytest.importorskip("sklearn")
UNLIKE = "unlike those that the model was trained on"


@pytest.fixture(scope="module")
def reader():
    return mm.UnderstandingPipeline.from_pretrained("mm-tiny")


@pytest.fixture(scope="module")
def editor():
    return mm.ImageEditPipeline.from_pretrained("mm-tiny")


def test_photographs_are_separated_from_renders(reader) -> None:
    report = measure(
        reader.understanding_encoder,
        reader.understanding_connector,
        rendered(8, 3, held_out=True),
        halves()[1][:6],
        renders=120,
    )
    assert report.auroc >= 0.97 and report.detected >= 0.85 and report.false_renders <= 0.05


def test_a_photograph_of_a_cat_is_from_outside_at_every_entry(reader, editor) -> None:
    cat = Image.open(photographs()["chelsea.png"])
    assert reader(cat).outside == [True]
    with (
        pytest.warns(UserWarning, match=UNLIKE),
        pytest.warns(UserWarning, match="451 x 300 pixels; its middle square"),
    ):
        editor(cat, "make it blue", num_inference_steps=1)
    engine = mm.load("mm-tiny")
    talk = engine.pipeline_for("converse")
    with pytest.warns(UserWarning, match=UNLIKE):
        list(talk.turn(talk.start(), "what is this?", cat))


def test_renders_and_large_pictures(reader, editor) -> None:
    (render,) = rendered(1, 5, held_out=False)
    assert reader(render).outside == [False]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        editor(render, "make the background night", num_inference_steps=1)
    with pytest.warns(UserWarning, match="2000 x 2000 pixels; it is read at 128 x 128$"):
        reader(render.resize((2000, 2000)))
    with pytest.warns(UserWarning, match="300 x 200 pixels; its middle square is read at 128 x 128$"):
        reader(render.resize((300, 200)))
    with pytest.warns(UserWarning, match="2000 x 2000 pixels; it is read at 128 x 128, and the result has that size"):
        editor(render.resize((2000, 2000)), "make the background night", num_inference_steps=1)


def test_a_thing_that_is_not_there_is_named_and_it_is_what_is_there(editor) -> None:
    picture = Image.fromarray(
        render([Scene(sprites=(Sprite(object="cat", x=64, y=64, size=60),))])[0].permute(1, 2, 0).numpy()
    )
    with pytest.warns(UserWarning, match="sees no dog in the picture"):
        editor(picture, "remove the dog", num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        named, meant = (
            editor(picture, words, num_inference_steps=1, generator=torch.Generator().manual_seed(1), output_type="np")
            for words in ("make the cat green", "could you make it green")
        )
    assert (named.images == meant.images).all()


def test_statistics_are_those_of_a_principal_component_analysis() -> None:
    torch.manual_seed(0)
    small = {"width": 32, "depth": 1, "heads": 2, "embed_dim": 16, "text_width": 32, "text_depth": 1}
    encoder, plain = UnderstandingEncoder(**small), Connector(in_channels=32)
    made = fit(encoder, plain, renders=64, rank=8)
    tokens = mean_tokens(encoder, rendered(64, 2, held_out=False))
    rest = tokens.double() - made.domain_mean.double()
    q = torch.linalg.qr(made.domain_basis.double().T)[0]
    wanted = (rest - rest @ q @ q.T).square().sum(1) / made.domain_limit.double()
    found = made.domain_distance(tokens[:, None])
    assert found is not None and torch.allclose(found.double(), wanted, rtol=1e-3)
    assert int((found > 1).sum()) <= 1  # one in a hundred
    assert plain.domain_distance(tokens[:, None]) is None


def test_crops_are_repeatable() -> None:
    one, again = crops("china.jpg", 3), crops("china.jpg", 3)
    assert [a.tobytes() for a in one] == [b.tobytes() for b in again]
