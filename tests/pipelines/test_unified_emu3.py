"""Emu3 in mm's pipelines, against transformers' own generation, on a tiny random model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_unified import PROMPTS, SIZE, noise, reading_inputs, save_emu3

import mm
import mm.cli
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash
from mm.pipelines.sampling import gumbel_noise, picture_generators
from mm.pipelines.unified import UnifiedTextToImagePipeline


@pytest.fixture(scope="module")
def emu3(tmp_path_factory) -> Path:
    return save_emu3(tmp_path_factory.mktemp("models") / "emu3")


@pytest.fixture(scope="module")
def emu3_drawing(emu3) -> UnifiedTextToImagePipeline:
    return mm.TextToImagePipeline.from_pretrained(emu3)


def emu3_generate(pipe, prompts, negative, **options):
    """Transformers' own drawing, with the constraint from its documentation, written anew."""
    form = {"return_for_image_generation": True, "ratio": "24:16", "image_area": 384, "return_tensors": "pt"}
    prompted = pipe.processor(text=prompts, padding=True, padding_side="left", **form)
    unconditional = pipe.processor(text=[negative] * len(prompts), **form)
    (height, width), start = prompted.pop("image_sizes")[0], prompted.input_ids.shape[1]
    closing = [pipe.processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|extra_201|>", "<|image end|>", "</s>")]

    def allowed(_, ids):
        row, column = divmod(len(ids) - start, width + 1)
        if row >= height:
            return closing[(len(ids) - start) - height * (width + 1) :][:1]
        mapping = pipe.model.vocabulary_mapping
        return mapping.image_tokens if column < width else [mapping.eol_token_id]

    out = pipe.model.generate(
        **prompted, max_new_tokens=height * (width + 1) + 3, prefix_allowed_tokens_fn=allowed,
        negative_prompt_ids=unconditional.input_ids, negative_prompt_attention_mask=unconditional.attention_mask,
        **options,
    )  # fmt: skip
    return out[:, start:]


def visual_tokens(sequences: torch.Tensor) -> torch.Tensor:
    return sequences[:, :8].view(-1, 2, 4)[:, :, :3].flatten(1)


def test_emu3_greedy_tokens_are_transformers_own(emu3_drawing):
    for scale in (1, 3.0):
        theirs = emu3_generate(emu3_drawing, PROMPTS, "a red house", do_sample=False, guidance_scale=scale)
        own = emu3_drawing(
            PROMPTS, negative_prompt="a red house", guidance_scale=scale, temperature=0, output_type="latent", **SIZE
        ).images
        assert torch.equal(own, visual_tokens(theirs))
        assert len(set(own.flatten().tolist())) > 3


def test_emu3_sampled_tokens_are_transformers_own_given_the_same_noise(emu3_drawing, monkeypatch):
    seed = torch.Generator().manual_seed(5)
    own = emu3_drawing(PROMPTS, negative_prompt="a dog", top_k=9, generator=seed, output_type="latent", **SIZE).images
    generators = picture_generators(seed, 2)
    visual = torch.tensor(emu3_drawing.model.vocabulary_mapping.image_tokens)

    def multinomial(share, num_samples):
        if (share.max(-1).values == 1).all():  # a forced token
            return share.argmax(-1, keepdim=True)
        return visual[(share[:, visual].log() + gumbel_noise(generators, (32,))).argmax(-1, keepdim=True)]

    monkeypatch.setattr(torch, "multinomial", multinomial)
    theirs = emu3_generate(emu3_drawing, PROMPTS, "a dog", do_sample=True, top_k=9, guidance_scale=3.0)
    assert torch.equal(own, visual_tokens(theirs))


def test_emu3_same_seed_same_picture_in_any_batch(emu3_drawing):
    options = {"output_type": "latent", **SIZE}
    several = emu3_drawing(PROMPTS, generator=torch.Generator().manual_seed(4), **options).images
    alone = emu3_drawing(PROMPTS[1], generator=torch.Generator().manual_seed(5), **options).images
    assert torch.equal(alone[0], several[1])


def test_emu3_pictures_are_the_decoders_own(emu3_drawing):
    theirs = emu3_generate(emu3_drawing, PROMPTS[:1], "a dog", do_sample=False, guidance_scale=3.0)
    wanted = emu3_drawing.model.decode_image_tokens(image_tokens=theirs, height=2, width=3)
    wanted = emu3_drawing.processor.postprocess(list(wanted.float()))["pixel_values"][0]
    picture = emu3_drawing(PROMPTS[0], negative_prompt="a dog", temperature=0, **SIZE).images[0]
    assert picture.size == (24, 16)
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 1


def test_emu3_answers_are_transformers_own(emu3):
    pipe = mm.UnderstandingPipeline.from_pretrained(emu3)
    pictures, questions = [noise(1), noise(2, 32, 48)], ["what colour is it", "describe the picture on the grass ."]
    inputs = reading_inputs(pipe, pictures, questions)
    said = pipe.model.generate(**inputs, max_new_tokens=128, do_sample=False)[:, inputs.input_ids.shape[1] :]
    theirs = [text.strip() for text in pipe.processor.batch_decode(said, skip_special_tokens=True)]
    assert pipe.answer(pictures, questions) == theirs
    assert theirs[0] != theirs[1]


def test_emu3_has_a_hash_of_its_base(emu3_drawing):
    """Its decoder counts batches in tensors without a dimension."""
    before = base_hash(emu3_drawing.model)
    counter = next(t for t in emu3_drawing.model.buffers() if t.ndim == 0 and not t.is_floating_point())
    counter.add_(1)
    assert base_hash(emu3_drawing.model) != before
    counter.sub_(1)
    assert base_hash(emu3_drawing.model) == before


def test_emu3_refuses_what_it_cannot_draw(emu3_drawing):
    with pytest.raises(UserError, match="steps of 8, not 24 x 15"):
        emu3_drawing(PROMPTS[0], height=15, width=24)
    with pytest.raises(UserError, match=re.escape("control token '<|image end|>'")):
        emu3_drawing("a cat <|image end|>", **SIZE)
    assert emu3_drawing.family.size(None, None) == (720, 720)
