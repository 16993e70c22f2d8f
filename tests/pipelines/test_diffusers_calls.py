"""Our pipelines take what diffusers' own take: arguments of the calls, and the calls for adapters."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.lora_pipeline import SD3LoraLoaderMixin
from PIL import Image
from tiny import draw, seeded, tiny_pipeline, tiny_reader
from trunk_loras import NEAR, lora_of

from mm import ImageEditPipeline, TextToImagePipeline
from mm.core.errors import UserError


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def editor() -> ImageEditPipeline:
    parts = tiny_reader()
    names = [name for name in inspect.signature(ImageEditPipeline.__init__).parameters if name in parts]
    made = ImageEditPipeline(**{name: parts[name] for name in names})
    made.set_progress_bar_config(disable=True)
    return made


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["flow", "codes"])
def test_each_prompt_has_its_negative_prompt(pipe: TextToImagePipeline, mode: str) -> None:
    """A list was once read as one sentence pair, for all pictures."""
    prompts, negatives = ["a cat", "a dog", "two red birds"], ["a cup", "", "neon style"]
    together = draw(pipe, prompts, negative_prompt=negatives, mode=mode, generator=seeded(1, 2, 3))
    for k in range(3):
        alone = draw(pipe, prompts[k], negative_prompt=negatives[k], mode=mode, generator=seeded(k + 1))
        torch.testing.assert_close(together[k : k + 1], alone, **NEAR)
    assert not torch.allclose(together[:1], draw(pipe, "a cat", mode=mode, generator=seeded(1)), atol=1e-3)


def test_one_negative_prompt_serves_all_and_other_numbers_are_refused(pipe: TextToImagePipeline) -> None:
    prompts = ["a cat", "a dog", "a bird"]
    one = draw(pipe, prompts, negative_prompt="a cup", generator=seeded(1, 2, 3))
    listed = draw(pipe, prompts, negative_prompt=["a cup"] * 3, generator=seeded(1, 2, 3))
    torch.testing.assert_close(one, listed, **NEAR)
    with pytest.raises(UserError, match="2 negative prompts for 3 prompts"):
        draw(pipe, prompts, negative_prompt=["a cup", "a hat"])
    with pytest.raises(UserError, match="a negative prompt is a text, got int 3"):
        draw(pipe, prompts, negative_prompt=["a", 3, "b"])


@pytest.mark.parametrize("mode", ["flow", "codes"])
def test_encoded_prompts_draw_what_the_texts_draw(pipe: TextToImagePipeline, mode: str) -> None:
    embeds, negative = pipe.encode_prompt(["a cat", "a dog"], negative_prompt="a cup", device="cpu")
    options: dict[str, Any] = {"mode": mode, "num_images_per_prompt": 2, "generator": seeded(1, 2, 3, 4)}
    want = draw(pipe, ["a cat", "a dog"], negative_prompt="a cup", **options)
    torch.testing.assert_close(
        draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative, **options), want, **NEAR
    )
    with pytest.raises(UserError, match="one of the two"):
        draw(pipe, "a cat", prompt_embeds=embeds)
    with pytest.raises(UserError, match="one of the two"):
        pipe()
    with pytest.raises(UserError, match="not both"):
        draw(pipe, "a cat", negative_prompt="a cup", negative_prompt_embeds=negative)


def test_a_long_prompt_is_cut_and_what_is_ignored_is_named(pipe: TextToImagePipeline) -> None:
    with pytest.warns(UserWarning, match=r"longer than the \d+ tokens that the model reads; ignored: 'cat"):
        long = draw(pipe, "cat " * 90 + "dog")
    with pytest.warns(UserWarning, match="ignored"):
        torch.testing.assert_close(long, draw(pipe, "cat " * 90), **NEAR)
    fits = "cat " * (pipe.text_tokenizer.model_max_length - 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the prompt is longer", UserWarning)
        draw(pipe, fits)


# ---- sigmas, sizes, components ---------------------------------------------------------------------------------------


def test_given_sigmas_are_the_steps(pipe: TextToImagePipeline) -> None:
    """Two steps of Euler's method by hand."""
    levels = [1.0, 0.4]
    got = draw(pipe, "a cat", sigmas=levels, num_inference_steps=None, guidance_scale=1, output_type="latent")
    x, cache = torch.randn((16, 8, 8), generator=seeded(7)[0])[None], pipe.encode_prompt("a cat")[0]
    with torch.no_grad():
        for now, then in zip(levels, [*levels[1:], 0.0], strict=True):
            sigma = torch.tensor([now])
            x = x + (then - now) * pipe.velocity_decoder(x, sigma, pipe.trunk(x, sigma, cache, "flow"))
    torch.testing.assert_close(got, x, **NEAR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": [0.5, 0.7]}, "falling"),
        ({"sigmas": []}, "num_inference_steps is 0|falling"),
        ({"sigmas": [1.0, 0.0]}, "falling"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "3 and there are 2 sigmas"),
        ({"sigmas": [1.0, 0.5], "mode": "codes"}, "mode='flow'"),
    ],
)
def test_wrong_sigmas(pipe: TextToImagePipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe("a cat", **options)


def test_without_an_autoencoder_there_are_latents(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    bare = TextToImagePipeline.from_pretrained(tmp_path, autoencoder=None)
    bare.set_progress_bar_config(disable=True)
    assert bare.autoencoder is None
    assert torch.equal(draw(bare, output_type="latent"), draw(pipe, output_type="latent"))
    with pytest.raises(UserError, match="no autoencoder; it gives output_type='latent' only"):
        draw(bare)


def test_diffusers_finds_our_pipelines_by_name(pipe: TextToImagePipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    found = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    found.set_progress_bar_config(disable=True)
    assert type(found) is TextToImagePipeline
    assert torch.equal(draw(found), draw(pipe))
    with pytest.raises(AttributeError, match="no attribute NoSuchPipeline"):
        _ = diffusers.NoSuchPipeline


def test_the_trunk_is_exported(pipe: TextToImagePipeline) -> None:
    latents, sigma, cache = torch.randn(1, 16, 8, 8), torch.tensor([0.5]), pipe.encode_prompt("a cat")[0]
    with torch.no_grad():
        exported = torch.export.export(pipe.trunk, (latents, sigma, cache))
        torch.testing.assert_close(exported.module()(latents, sigma, cache), pipe.trunk(latents, sigma, cache), **NEAR)


# ---- editing ---------------------------------------------------------------------------------------------------------


def edited(editor: ImageEditPipeline, image: Any, prompt: Any = "make it red", **options: Any) -> torch.Tensor:
    settings = {"num_inference_steps": 2, "output_type": "pt", "generator": seeded(5)[0]} | options
    return editor(image, prompt, **settings).images


def test_a_source_may_be_an_array_or_a_tensor(editor: ImageEditPipeline) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (128, 128, 3), dtype=np.uint8)
    want = edited(editor, Image.fromarray(pixels))
    scaled = pixels.astype(np.float32) / 255
    sources = [pixels, scaled, scaled[None], torch.from_numpy(pixels).permute(2, 0, 1), [scaled]]
    for source in (*sources, torch.from_numpy(scaled).permute(2, 0, 1)[None]):
        assert torch.equal(edited(editor, source), want)
    two = edited(editor, torch.from_numpy(np.stack([scaled, scaled])).permute(0, 3, 1, 2), ["make it red"] * 2)
    torch.testing.assert_close(two[:1], want, **NEAR)
    mask = np.zeros((128, 128), np.float32)
    mask[:, :64] = 1
    masked = edited(editor, pixels, mask_image=mask)
    assert torch.equal(masked, edited(editor, pixels, mask_image=Image.fromarray((mask * 255).astype(np.uint8))))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((128, 128), np.float32), r"of shape \(128, 128\); give \(H, W, 3\)"),
        (torch.zeros(4, 8, 8), r"of shape \(4, 8, 8\); give \(3, H, W\)"),
        (np.full((8, 8, 3), 7.0), "values from 7 to 7"),
        (np.full((8, 8, 3), np.nan), "finite numbers"),
        (np.zeros((8, 8, 3), np.int64), "of int64; give bytes"),
    ],
)
def test_arrays_that_are_no_pictures(editor: ImageEditPipeline, source: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        edited(editor, source)


def test_editing_takes_the_other_arguments_of_drawing(editor: ImageEditPipeline) -> None:
    picture = Image.new("RGB", (128, 128), (200, 60, 30))
    plain = edited(editor, picture)
    noise = torch.randn((16, 8, 8), generator=seeded(5)[0])[None]
    assert torch.equal(edited(editor, picture, latents=noise), plain)
    assert torch.equal(edited(editor, picture, height=128, width=128, negative_prompt=""), plain)
    assert not torch.allclose(edited(editor, picture, negative_prompt="neon style"), plain, atol=1e-4)
    with pytest.raises(UserError, match="128 x 256"):
        edited(editor, picture, height=256)
    with pytest.raises(UserError, match="2 negative prompts for 1 instruction"):
        edited(editor, picture, negative_prompt=["a", "b"])
    editor.load_lora_weights(lora_of(editor, 3))
    try:
        assert not torch.allclose(edited(editor, picture), plain, atol=1e-3)
        torch.testing.assert_close(edited(editor, picture, attention_kwargs={"scale": 0.0}), plain, **NEAR)
    finally:
        editor.unload_lora_weights()
    assert torch.equal(edited(editor, picture), plain)


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_the_calls_have_diffusers_names_and_arguments() -> None:
    """Arguments of diffusers' own mixins are arguments here, so that scripts for FLUX or SD3 run."""
    own = {"pack_weights", "write_lora_layers"}  # steps of its save_lora_weights
    for name in [n for n in vars(LoraBaseMixin) if not n.startswith("_") and n not in own]:
        assert hasattr(TextToImagePipeline, name), name
    other = {"components", "lora_scale", "safe_fusing", "adapter_names"}
    assert other <= set(inspect.signature(TextToImagePipeline.fuse_lora).parameters)
    assert "components" in inspect.signature(TextToImagePipeline.unfuse_lora).parameters
    theirs = inspect.signature(SD3LoraLoaderMixin.load_lora_weights).parameters
    ours = inspect.signature(TextToImagePipeline.load_lora_weights).parameters
    assert set(theirs) - {"kwargs"} <= set(ours)
