"""What an erasure refuses before any work, and 4-bit models, which draw each prompt alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline
from tiny_pipelines import tiny_pipeline_of
from torch import nn

import mm
from mm.core.errors import UserError
from mm.erasure.features import record
from mm.erasure.methods import dve, hirm, prune
from mm.erasure.routes import _Ids


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline_of("stable-diffusion")


@pytest.mark.parametrize(
    ("targets", "given", "said"),
    [
        (["cat", "fox"], {"anchors": ["fox", "cat"]}, "the anchor 'fox' is a target itself"),
        (["wolf"], {"anchors": ["Wolf"]}, "'wolf' is target and anchor"),
        (["wolf"], {"retain": ["Wolf"]}, "'Wolf' is a target and retained"),
        (["wolf"], {"retain": ["object: wolf"]}, "is a target and retained"),
        (["WOLF", "wolf"], {}, "the target 'wolf' is given twice"),
        (["wolf"], {"rank": 0}, "rank is 0; give a whole number from 1"),
        (["wolf"], {"rank": 1.5}, "rank is 1.5; give a whole number"),
        (["wolf"], {"rank": "x"}, "rank is 'x'; give a whole number"),
        (["wolf"], {"ridge": float("nan")}, "ridge is nan; give a number from 0"),
        (["wolf"], {"preserve": -1}, "preserve is -1; give a number from 0"),
        (["wolf"], {"strength": "1"}, "strength is '1'; give a number"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: Any, targets: list[str], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        mm.erase(pipe, targets, **given)


@pytest.mark.parametrize("sites", [dve.picture_sites, hirm.first_blocks, prune.second_layers])
def test_a_model_without_the_layers_of_a_method_is_refused_with_what_to_do(sites: Any) -> None:
    bare = SimpleNamespace(components={"unet": nn.Sequential(nn.Conv2d(3, 3, 1))})
    with pytest.raises(UserError, match=r"has no .* that (dve|hirm|prune) could change; choose another method"):
        sites(bare)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "x"])
def test_a_scale_that_is_no_number_is_refused(scale: Any) -> None:
    pipe = tiny_pipeline(codes=False)
    patch = mm.erase(pipe, ["cat"], rank=4)
    before = pipe.trunk.state_dict()
    with pytest.raises(UserError, match="scale is"):
        patch.apply(pipe, scale=scale)
    assert all(torch.equal(value, pipe.trunk.state_dict()[name]) for name, value in before.items())
    patch.apply(pipe)
    with pytest.raises(UserError, match="scale is"):
        patch.scale(pipe, scale)
    patch.undo(pipe)


class _Alone:
    """A pipeline that draws each prompt by itself, as 4-bit models do whose layers round their inputs."""

    def __init__(self) -> None:
        self.words, self.layer = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.components = {"text_encoder": nn.ModuleList([self.words, self.layer])}

    def set_progress_bar_config(self, **given: Any) -> None:
        pass

    def __call__(self, prompt: list[str], image: list[Any], num_inference_steps: int = 1) -> None:
        for text in prompt:
            self.layer(self.words(torch.tensor([[len(word) for word in text.split()]])))


def test_token_numbers_stay_beside_their_features_where_prompts_are_drawn_alone() -> None:
    pipe = _Alone()
    ids = _Ids.__new__(_Ids)
    ids.tables, ids.rows, ids._begun = [pipe.words], [], 0
    texts = ["a bb ccc", "dddd e", "ff gg hhh i"] * 30  # more than one call
    with ids:
        read = record(pipe, {"layer": pipe.layer}, texts, [None] * len(texts), ids)["layer"]
    assert ids.rows == [[len(word) for word in text.split()] for text in texts]
    for row, x_TD in zip(ids.rows, read, strict=True):
        assert torch.allclose(x_TD[: len(row)], pipe.words(torch.tensor(row)))
