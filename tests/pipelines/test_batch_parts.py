"""4-bit models draw a picture with the same bits in any call; 16-bit ones draw a batch at once."""

from __future__ import annotations

import inspect

import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline, tiny_reader

import mm
from mm.pipelines.batch_parts import parts_of, rounds_activations
from mm.pipelines.image_edit import ImageEditPipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CONFIG = mm.SVDQuantConfig(rank=4, data_free=True)


@pytest.mark.parametrize("mode", ["flow", "codes"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_picture_has_the_same_bits_alone_and_in_a_batch(mode, bits):
    pipe = tiny_pipeline()
    mm.quantize(pipe, mm.SVDQuantConfig(rank=4, data_free=True, bits=bits), progress=False)
    assert rounds_activations(pipe)
    options = {"mode": mode, "num_inference_steps": 2, "output_type": "pt"}
    prompts = ["a cat", "two red dogs on grass"]
    together = pipe(prompts, num_images_per_prompt=2, generator=seeded(5), **options).images
    assert together.shape[0] == 4
    for k in range(4):
        alone = pipe(prompts[k // 2], generator=seeded(5 + k), **options).images
        assert torch.equal(torch.as_tensor(alone[0]), torch.as_tensor(together[k]))


def test_edits_have_the_same_bits_alone_and_in_a_batch():
    takes = inspect.signature(ImageEditPipeline.__init__).parameters
    pipe = ImageEditPipeline(**{name: part for name, part in tiny_reader().items() if name in takes})
    pipe.set_progress_bar_config(disable=True)
    mm.quantize(pipe, CONFIG, progress=False)
    pictures = [Image.new("RGB", (128, 128), colour) for colour in ("red", "blue")]
    words = ["make it night", "add a cat"]
    options = {"num_inference_steps": 2, "output_type": "pt"}
    together = pipe(pictures, words, generator=seeded(3), **options).images
    for k in range(2):
        alone = pipe(pictures[k], words[k], generator=seeded(3 + k), **options).images
        assert torch.equal(alone[0], together[k])


def test_parts_come_from_rounding_alone():
    pipe = tiny_pipeline()
    assert parts_of(pipe, 3) == [slice(0, 3)]
    mm.quantize(pipe, mm.SVDQuantConfig(rank=4, data_free=True, activation_bits=16), progress=False)
    assert not rounds_activations(pipe)


def test_latents_and_other_types_are_joined():
    pipe = tiny_pipeline()
    mm.quantize(pipe, CONFIG, progress=False)
    noise = torch.randn(2, 16, 8, 8)
    common = {"num_inference_steps": 1, "latents": noise, "num_images_per_prompt": 2, "generator": seeded(0)}
    assert pipe("a cat", output_type="latent", **common).images.shape == (2, 16, 8, 8)
    assert pipe("a cat", output_type="np", **common).images.shape[0] == 2
    assert len(pipe("a cat", output_type="pil", **common).images) == 2
