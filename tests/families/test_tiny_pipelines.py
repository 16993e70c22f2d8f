"""The tiny pipelines that other tests draw with: real classes, a family each, and a prompt that matters."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_pipelines import PIPELINES, SIDE, draw_with, tiny_pipeline_of

from mm.families import family_of, quantizable_parts
from mm.families.folders import family_at


@pytest.mark.parametrize("name", PIPELINES)
def test_a_tiny_pipeline_draws_by_its_prompt_and_is_of_its_family(name):
    pipe = tiny_pipeline_of(name)
    first, again = draw_with(name, pipe), draw_with(name, pipe)
    other = draw_with(name, pipe, prompt="a blue dog at night on a hill")
    assert first.shape == (1, 3, SIDE, SIDE)
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert family_of(pipe).name == name
    assert set(quantizable_parts(pipe)) <= {"transformer", "unet"}


@pytest.mark.parametrize("name", ["stable-diffusion", "flux-schnell", "qwen-image-edit"])
def test_a_saved_folder_is_of_the_same_family_and_draws_the_same(name, tmp_path):
    pipe = tiny_pipeline_of(name)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert family_at(tmp_path).name == name
    assert torch.allclose(draw_with(name, pipe), draw_with(name, again), atol=1e-4)
