"""Janus and Emu3 in mm's pipelines: tiny random models of transformers' classes, against transformers' own calls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_unified import PROMPTS, noise, reading_inputs, save_janus
from transformers import AutoTokenizer, JanusForConditionalGeneration
from typer.testing import CliRunner, Result

import mm
import mm.cli
from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear
from mm.pipelines.sampling import gumbel_noise, picture_generators
from mm.pipelines.unified import UnifiedTextToImagePipeline, UnifiedUnderstandingPipeline, kind_at
from mm.quantization.config import SVDQuantConfig
from mm.quantization.folders import quantize_folder


@pytest.fixture(scope="module")
def janus(tmp_path_factory) -> Path:
    return save_janus(tmp_path_factory.mktemp("models") / "janus")


@pytest.fixture(scope="module")
def drawing(janus) -> UnifiedTextToImagePipeline:
    return mm.TextToImagePipeline.from_pretrained(janus)


@pytest.fixture(scope="module")
def reading(drawing) -> UnifiedUnderstandingPipeline:
    return UnifiedUnderstandingPipeline(**drawing.components)


def test_a_hub_name_picks_the_adapter_as_well(janus, tmp_path):
    """From the cache, as after a download; the tests are offline."""
    cached = tmp_path / "models--someone--janus"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(janus, cached / "snapshots" / ("0" * 40))
    pipe = mm.TextToImagePipeline.from_pretrained("someone/janus", cache_dir=tmp_path)
    assert isinstance(pipe.model, JanusForConditionalGeneration)
    assert kind_at("someone/other", {"cache_dir": tmp_path}) is None
    with pytest.raises(UserError, match="which ImageEditPipeline cannot use"):
        mm.ImageEditPipeline.from_pretrained("someone/janus", cache_dir=tmp_path)


def drawing_inputs(pipe, prompts):
    """What a script for transformers does with prompts."""
    turns = [[{"role": "user", "content": [{"type": "text", "text": p}]}] for p in prompts]
    texts = pipe.processor.apply_chat_template(turns, add_generation_prompt=True)
    return pipe.processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")


def test_the_folder_picks_the_adapter(janus, drawing):
    assert type(drawing) is UnifiedTextToImagePipeline
    assert type(mm.UnderstandingPipeline.from_pretrained(janus)) is UnifiedUnderstandingPipeline
    assert isinstance(drawing.model, JanusForConditionalGeneration)


@pytest.mark.parametrize("scale", [5.0, 1.5])
def test_greedy_tokens_are_transformers_own(drawing, scale):
    own = drawing(PROMPTS, guidance_scale=scale, temperature=0, output_type="latent").images
    theirs = drawing.model.generate(
        **drawing_inputs(drawing, PROMPTS), generation_mode="image", do_sample=False, guidance_scale=scale
    )
    assert torch.equal(own, theirs)
    assert len(set(own.flatten().tolist())) > 8  # a model that repeats one token would pass any test
    assert not torch.equal(own[0], own[1])


@pytest.mark.parametrize("top_k", [0, 7])
def test_sampled_tokens_are_transformers_own_given_the_same_noise(drawing, monkeypatch, top_k):
    own = drawing(
        PROMPTS, generator=torch.Generator().manual_seed(5), temperature=0.9, top_k=top_k, output_type="latent"
    ).images
    generators = picture_generators(torch.Generator().manual_seed(5), 2)

    def multinomial(share, num_samples):
        return (share.log() + gumbel_noise(generators, (share.shape[-1],))).argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    theirs = drawing.model.generate(
        **drawing_inputs(drawing, PROMPTS),
        generation_mode="image", do_sample=True, guidance_scale=5.0, temperature=0.9, top_k=top_k,
    )  # fmt: skip
    assert torch.equal(own, theirs)
    greedy = drawing(PROMPTS, temperature=0, output_type="latent").images
    assert not torch.equal(own, greedy)


def test_same_seed_same_picture_in_any_batch(drawing):
    first = torch.Generator().manual_seed(11)
    several = drawing(PROMPTS, num_images_per_prompt=2, generator=first, output_type="latent").images
    assert len({tuple(row) for row in several.tolist()}) == 4
    for k, prompt in enumerate([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]):
        alone = drawing(prompt, generator=torch.Generator().manual_seed(11 + k), output_type="latent").images
        assert torch.equal(alone[0], several[k])


def test_pictures_are_the_decoders_own(drawing):
    tokens = drawing(PROMPTS[0], generator=torch.Generator().manual_seed(2), output_type="latent").images
    picture = drawing(PROMPTS[0], generator=torch.Generator().manual_seed(2)).images[0]
    theirs = drawing.processor.postprocess(list(drawing.model.decode_image_tokens(tokens).float()))["pixel_values"][0]
    difference = np.asarray(picture, dtype=int) - theirs.permute(1, 2, 0).numpy().astype(int)
    assert picture.size == (32, 32)
    assert np.abs(difference).max() <= 1  # transformers cuts off, diffusers rounds
    assert np.asarray(picture).std() > 5


def test_without_guidance_one_row_a_picture_is_read(drawing, monkeypatch):
    rows = []
    read = drawing.family.read
    monkeypatch.setattr(drawing.family, "read", lambda new, *rest: (rows.append(len(new)), read(new, *rest))[1])
    drawing(PROMPTS, guidance_scale=1, temperature=0, output_type="latent")
    assert set(rows) == {2} and len(rows) == 16


def test_answers_are_transformers_own(reading, tmp_path):
    pictures, questions = [noise(1), noise(2)], ["what colour is it", "describe the picture on the grass ."]
    inputs = reading_inputs(reading, pictures, questions)
    said = reading.model.generate(**inputs, max_new_tokens=128, do_sample=False)[:, inputs.input_ids.shape[1] :]
    theirs = reading.processor.batch_decode(said, skip_special_tokens=True)
    assert reading.answer(pictures, questions) == [text.strip() for text in theirs]
    assert theirs[0] != theirs[1]
    alone = [reading.answer([p], [q])[0] for p, q in zip(pictures, questions, strict=True)]
    assert alone == reading.answer(pictures, questions)
    pictures[0].save(tmp_path / "a.png")
    assert reading(tmp_path / "a.png", questions[0]).answers == alone[:1]  # a path is as good as a picture
    assert reading(pictures[0], questions).outside == [False, False]


def test_a_picture_changes_the_answer(reading):
    assert len({reading.describe([noise(k)])[0] for k in range(4)}) > 1


def test_saved_as_transformers_does(drawing, tmp_path):
    drawing.save_pretrained(tmp_path / "copy")
    again = mm.TextToImagePipeline.from_pretrained(tmp_path / "copy")
    seed = torch.Generator().manual_seed(3)
    assert torch.equal(*(p(PROMPTS, generator=seed, output_type="latent").images for p in (drawing, again)))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "copy")) == len(drawing.processor.tokenizer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompt": ""}, "says what to draw"),
        ({"prompt": []}, "says what to draw"),
        ({"prompt": "a <boi> cat"}, "control token '<boi>'"),
        ({"mode": "flow"}, "mode 'flow'"),
        ({"height": 64}, "draws 32 x 32"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"output_type": "gif"}, "unknown output_type 'gif'"),
        ({"negative_prompt": "a dog"}, "without negative prompts"),
    ],
)
def test_what_cannot_be_drawn_is_refused(drawing, options, match):
    with pytest.raises(UserError, match=match):
        drawing(**({"prompt": PROMPTS[0]} | options))


def test_what_cannot_be_answered_is_refused(reading):
    with pytest.raises(UserError, match="2 pictures and 3 questions"):
        reading([noise(0)] * 2, ["what"] * 3)
    with pytest.raises(UserError, match="control token '<image>'"):
        reading(noise(0), "what is <image>")
    with pytest.raises(UserError, match="no picture at"):
        reading("nowhere.png")
    with pytest.raises(UserError, match="max_words is 0"):
        reading(noise(0), max_words=0)


def test_the_command_line_draws_and_reads(janus, reading, tmp_path):
    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(mm.cli.app, [str(a) for a in (*arguments, "--model", janus)])

    drawn = run("generate", "a red cat", "--mode", "codes", "--seed", "4", "-o", tmp_path)
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(tmp_path / "00000.png").size == (32, 32)
    read = run("describe", tmp_path / "00000.png", "--json", tmp_path / "said.json")
    assert read.exit_code == 0, read.output
    (row,) = json.loads((tmp_path / "said.json").read_text())
    assert row["answer"] == reading.describe([tmp_path / "00000.png"])[0]
    assert row["outside"] is False
    refused = run("generate", "a red cat", "--mode", "flow", "-o", tmp_path)
    assert refused.exit_code == 1
    assert "codes" in refused.stderr.splitlines()[-1]


def test_wrong_folders_are_refused(janus, tmp_path):
    for kind, lacks in (("ImageEditPipeline", "cannot edit"), ("InterleavedPipeline", "cannot converse")):
        with pytest.raises(UserError, match=lacks):
            getattr(mm, kind).from_pretrained(janus)
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"'llama'.*emu3, janus"):
        mm.TextToImagePipeline.from_pretrained(other)
    broken = tmp_path / "janus"
    broken.mkdir()
    (broken / "config.json").write_text((janus / "config.json").read_text())
    with pytest.raises(UserError, match="cannot be loaded"):
        mm.UnderstandingPipeline.from_pretrained(broken)
    with pytest.raises(UserError, match="use_safetensors"):
        mm.TextToImagePipeline.from_pretrained(janus, use_safetensors=False)


def test_missing_tensors_are_refused(janus, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(janus, copy)
    tensors = load_file(copy / "model.safetensors")
    gone = next(name for name in tensors if "generation_head" in name)
    save_file({k: v for k, v in tensors.items() if k != gone}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=gone.split(".", 1)[1]):
        mm.TextToImagePipeline.from_pretrained(copy)


def first_logits(pipe: UnifiedTextToImagePipeline) -> torch.Tensor:
    """Of the first code, for both prompts."""
    inputs = drawing_inputs(pipe, PROMPTS)
    features = pipe.model.model.language_model(**inputs).last_hidden_state[:, -1]
    return pipe.model.model.generation_head(features).float()


@torch.no_grad()
def test_a_4_bit_copy_is_loaded_as_any_other_folder(janus, drawing, tmp_path):
    report = quantize_folder(janus, tmp_path / "small", SVDQuantConfig(rank=16, steps=1), prompts=PROMPTS, pictures=1)
    assert {layer.path.split(".")[2] for layer in report.layers} == {"language_model"}
    assert len(report.layers) == 14
    small = mm.TextToImagePipeline.from_pretrained(tmp_path / "small")
    assert isinstance(small.model.model.language_model.layers[0].mlp.up_proj, BranchedLinear)
    both = torch.stack([first_logits(drawing).flatten(), first_logits(small).flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    assert not torch.equal(*both)
    reader = mm.UnderstandingPipeline.from_pretrained(tmp_path / "small")
    assert reader.describe([noise(0)]) == UnifiedUnderstandingPipeline(**small.components).describe([noise(0)])
