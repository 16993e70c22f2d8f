"""Pictures of the subject beside something known: boxes, captions, and a run that takes them in."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.core.errors import UserError
from mm.customization.companions import balanced, beside, companions, pasted
from mm.customization.customize import customize
from mm.customization.data import Example, read_folder
from mm.customization.objectives.protocol import objective_of
from mm.customization.places import Box, box_of, fitted, subject_box
from mm.evaluation.customize_table import GROUNDS, write_folder


def test_a_box_is_around_what_stands_out() -> None:
    field = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    field[4:9, 10:14] += 1
    found = box_of(field)
    assert abs(found.top - 4 / 16) <= 1 / 16 and abs(found.bottom - 9 / 16) <= 1 / 16
    assert abs(found.left - 10 / 16) <= 1 / 16 and abs(found.right - 14 / 16) <= 1 / 16
    assert found.overlap(Box(left=0.0, top=0.0, right=0.5, bottom=1.0)) == 0
    whole = Box(left=0.0, top=0.0, right=1.0, bottom=1.0)
    assert found.overlap(whole) == pytest.approx(1)


def test_a_fitted_box_covers_its_place_and_keeps_its_shape() -> None:
    box, place = Box(left=0.2, top=0.2, right=0.6, bottom=0.4), Box(left=0.7, top=0.1, right=0.9, bottom=0.5)
    made = fitted(box, place)
    assert made.left <= place.left and made.right >= place.right and made.right <= 1
    assert made.top <= place.top + 1e-9 and made.bottom >= place.bottom - 1e-9
    assert (made.right - made.left) / (made.bottom - made.top) == pytest.approx(2.0)
    onto, subject = Image.new("RGB", (100, 100), (0, 0, 200)), Image.new("RGB", (50, 50), (200, 0, 0))
    seen = np.asarray(pasted(onto, subject, box, made))
    middle = round(50 * (made.top + made.bottom)), round(50 * (made.left + made.right))
    assert tuple(seen[middle]) == (200, 0, 0)
    assert tuple(seen[95, 5]) == (0, 0, 200)


@pytest.mark.parametrize(
    ("caption", "noun", "first", "wanted"),
    [
        ("a <mug> on grass", "", True, "a <mug> and an apple on grass"),
        ("a <mug> on grass", "", False, "an apple and a <mug> on grass"),
        ("a photo of a <mug> cup at night", "cup", False, "a photo of an apple and a <mug> cup at night"),
        ("<mug>", "", True, "<mug> and an apple"),
        ("no name here", "", True, "no name here, an apple"),
    ],
)
def test_captions_name_both(caption: str, noun: str, first: bool, wanted: str) -> None:
    assert beside(caption, "<mug>", noun, "apple", first=first) == wanted


def test_the_users_pictures_stay_the_greater_part() -> None:
    own = [Example(path=Path("a"), caption="", picture=Image.new("RGB", (8, 8)), repeats=k) for k in (1, 3)]
    made = [Example(path=Path("b"), caption="", picture=Image.new("RGB", (8, 8)))] * 9
    every = balanced(own, made)
    assert sum(e.repeats for e in every[:2]) >= 2 * 9
    assert every[1].repeats == 3 * every[0].repeats
    assert [e.repeats for e in balanced(own, [])] == [1, 3]


def test_the_subject_is_found_in_our_world(tmp_path: Path) -> None:
    """The box covers nearly all of a new object, and is not the whole picture; a mask of the user's is exact."""
    import mm

    pipe = mm.TextToImagePipeline.from_pretrained("mm-tiny")
    pipe.set_progress_bar_config(disable=True)
    objective = objective_of(pipe)
    examples = read_folder(write_folder(tmp_path / "pictures", "catcar"), name="<catcar>")
    for ground, example in zip(GROUNDS[:2], examples, strict=False):
        rng = random.Random(f"customize table catcar {ground} 0")  # as `joined` places it
        size = rng.choice((52, 60))
        x, y = rng.randint(40, 88), rng.randint(40, 88)
        true = Box(left=(x - size / 2) / 128, top=(y - size / 2) / 128, right=(x + size / 2) / 128,
                   bottom=(y + size / 2) / 128)  # fmt: skip
        found = subject_box(objective, example, "<catcar>", "dog")
        assert found.overlap(true) > 0.7
        assert found.area < 0.5
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 32, 48, 64))
    masked = Example(path=Path("m"), caption="a <mug>", picture=Image.new("RGB", (64, 64)), mask=mask)
    assert subject_box(objective, masked, "<mug>", "dog") == Box(left=0.25, top=0.5, right=0.75, bottom=1.0)
    (made,) = companions(objective, examples, name="<catcar>", noun="", count=1, seed=0, steps=3)
    assert made.picture.size == (128, 128) and "<catcar>" in made.caption


def test_a_run_takes_them_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are examples behind the user's own, which previews score; without any there is a warning."""
    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data", 2)
    fast: dict[str, Any] = {"steps": 2, "batch_size": 1, "size": SIDE, "preview_every": 2, "preserve": 0.0}
    places = iter([Box(left=0.0, top=0.0, right=0.3, bottom=0.3), Box(left=0.6, top=0.6, right=0.9, bottom=0.9)] * 9)
    monkeypatch.setattr("mm.customization.companions.drawn_box", lambda *_: next(places))
    learned = customize(pipe, folder, name="<mug>", companions=2, sample_steps=1, samples=(), **fast)
    assert (learned.report["pictures"], learned.report["companions"]) == (2, 2)
    whole = Box(left=0.0, top=0.0, right=1.0, bottom=1.0)
    monkeypatch.setattr("mm.customization.companions.drawn_box", lambda *_: whole)
    with pytest.warns(UserWarning, match="is learned alone"):
        learned = customize(pipe, folder, name="<mug>", companions=1, sample_steps=1, samples=(), **fast)
    assert learned.report["companions"] == 0
    with pytest.raises(UserError, match="companions is -1"):
        customize(pipe, folder, name="<mug>", companions=-1, **fast)
