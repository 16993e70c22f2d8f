"""A style's colours: the map is that of least squares, and pictures of other things get it."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.customization import recoloured as module
from mm.customization.customize import customize
from mm.customization.data import Example, read_folder
from mm.customization.objectives.protocol import objective_of
from mm.customization.recoloured import about, explained, fitted_map, in_colours, recoloured, renamed, terms


def pictures(count: int, side: int = 12, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) - 1


def colours(given: torch.Tensor) -> torch.Tensor:
    return (given.double() / 2 + 0.5).flatten(2).transpose(1, 2)


def test_the_map_is_that_of_least_squares() -> None:
    """Against numpy's, on terms that are written out here."""
    plain, styled = pictures(3), pictures(3, seed=1)
    r, g, b = (colours(plain).reshape(-1, 3)[:, k].numpy() for k in range(3))
    rows = np.stack([np.ones_like(r), r, g, b, r * r, r * g, r * b, g * g, g * b, b * b], 1)
    wanted = np.linalg.lstsq(rows, colours(styled).reshape(-1, 3).numpy(), rcond=None)[0]
    found = terms(plain).flatten(0, 1) @ fitted_map(terms(plain), colours(styled))
    assert np.abs(found.numpy() - rows @ wanted).max() < 0.02


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: x[:, [2, 0, 1]], lambda x: x.mean(1, keepdim=True) * 0.8])
def test_a_change_of_colours_is_found_and_given_to_other_pictures(change: Any) -> None:
    plain, other = pictures(4), pictures(1, seed=9)
    styled = change(plain).expand(-1, 3, -1, -1)
    assert explained(terms(plain), colours(styled)) > 0.99
    array = ((other[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    made = np.asarray(in_colours(Image.fromarray(array), fitted_map(terms(plain), colours(styled))), dtype=float)
    wanted = change(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1).expand(-1, 3, -1, -1)
    assert np.abs(made / 127.5 - 1 - wanted[0].permute(1, 2, 0).numpy()).max() < 0.05


def test_colours_that_follow_from_nothing_explain_nothing() -> None:
    assert explained(terms(pictures(4)), colours(pictures(4, seed=5))) < 0.05


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("a fish on the beach", r"an? \w+ on the beach"), ("a picture", r"an? \w+"), ("the big fish", r"an? \w+")],
)
def test_another_thing_takes_the_place_of_the_named_one(words: str, wanted: str) -> None:
    nouns = ("fish", "owl", "car")
    for seed in range(6):
        found = about(words, nouns, random.Random(seed))
        assert re.fullmatch(wanted, found)
        assert "fish" not in found or "fish" not in words


@pytest.mark.parametrize(
    ("caption", "words", "wanted"),
    [
        ("a fish, <ink> style", "a fish", "an owl, <ink> style"),
        ("a picture in the style of <ink>", "a picture", "an owl in the style of <ink>"),
        ("<ink>", "", "an owl, <ink>"),
        ("a  fish, <ink> style", "a fish", "an owl, <ink> style"),
    ],
)
def test_captions_keep_the_style(caption: str, words: str, wanted: str) -> None:
    assert renamed(caption, words, "an owl", "<ink>") == wanted


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline_of("stable-diffusion")


def styled_folder(folder: Path) -> Path:
    subject_folder(folder)
    for file in folder.glob("*.txt"):
        file.write_text("a cat in the style of [trigger]\n")
    return folder


def test_a_style_without_a_map_of_colours_is_learned_from_its_pictures(pipe: Any, tmp_path: Path) -> None:
    """A random model redraws noise, from which no colour follows."""
    folder = styled_folder(tmp_path / "style")
    fast = {"steps": 1, "batch_size": 1, "size": SIDE, "samples": (), "sample_steps": 1, "preserved": ()}
    with pytest.warns(UserWarning, match="do not follow from those that the base draws"):
        patch = customize(pipe, folder, name="<ink>", kind="style", recoloured=3, **fast)
    assert patch.report["companions"] == 0


def test_pictures_of_other_things_join_the_run(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = styled_folder(tmp_path / "style")
    negative = lambda objective, styled, words, seed: -styled  # noqa: E731
    monkeypatch.setattr(module, "_redrawn", negative)
    objective, examples = objective_of(pipe, SIDE), read_folder(folder, name="<ink>", kind="style")
    made, plain = recoloured(objective, examples, name="<ink>", count=3, seed=1, steps=1)
    again, _ = recoloured(objective, examples, name="<ink>", count=3, seed=1, steps=1)
    assert [e.caption for e in made] == [e.caption for e in again] and len(made) == 3
    assert all("in the style of <ink>" in e.caption and "cat" not in e.caption for e in made)
    assert all(one.picture.tobytes() == two.picture.tobytes() for one, two in zip(made, again, strict=True))
    assert len(plain) == 3 and all("<ink>" not in e.caption for e in plain)
    pixels = [np.asarray(e.picture, dtype=float).ravel() for e in (plain[0], made[0])]
    assert np.corrcoef(*pixels)[0, 1] < -0.5  # the negative
    fast = {"steps": 1, "batch_size": 1, "size": SIDE, "samples": (), "sample_steps": 1, "preserved": ()}
    patch = customize(pipe, folder, name="<ink>", kind="style", recoloured=3, **fast)
    assert patch.report["companions"] == 3


def test_nothing_is_made_of_one_picture_or_where_none_are_wanted(pipe: Any) -> None:
    example = Example(path=Path("a.png"), caption="a cat, <ink> style", picture=Image.new("RGB", (SIDE, SIDE)))
    objective = objective_of(pipe, SIDE)
    assert recoloured(objective, [example], name="<ink>", count=3, seed=0) == ([], [])
    assert recoloured(objective, [example] * 3, name="<ink>", count=0, seed=0) == ([], [])
