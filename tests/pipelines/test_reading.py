"""Reading and editing on a tiny random model: pictures of every kind, batches, masks, guidance, the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import seeded, tiny_reader

from mm import ImageEditPipeline, TextToImagePipeline, UnderstandingPipeline
from mm.core.errors import UserError
from mm.models.dialogue import Dialogue
from mm.pipelines.pictures import open_picture, to_tensor
from mm.world.render import render
from mm.world.scene import Scene, Sprite

READS = ("text_tokenizer", "trunk", "understanding_encoder", "understanding_connector")


@pytest.fixture(scope="module")
def parts():
    return tiny_reader()


@pytest.fixture(scope="module")
def reader(parts):
    return UnderstandingPipeline(**{name: parts[name] for name in READS})


@pytest.fixture(scope="module")
def editor(parts):
    pipe = ImageEditPipeline(**{name: part for name, part in parts.items() if name != "latent_stem"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    scenes = [Scene(sprites=(Sprite(object=o, x=64, y=64, size=60),)) for o in ("cat", "car", "tree")]
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in render(scenes)]


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory) -> Path:
    """One folder for all pipelines, as weights/mm-tiny is."""
    where = tmp_path_factory.mktemp("model") / "tiny"
    draws = TextToImagePipeline(**{n: p for n, p in parts.items() if n not in (*READS[2:4], "latent_stem")})
    draws.save_pretrained(where)
    index = json.loads((where / "model_index.json").read_text())
    for name in ("understanding_encoder", "understanding_connector", "latent_stem"):
        parts[name].save_pretrained(where / name)
        index[name] = [type(parts[name]).__module__, type(parts[name]).__name__]
    (where / "model_index.json").write_text(json.dumps(index))
    return where


# ---- pictures from outside ------------------------------------------------------------------------------------------


def test_pictures_of_any_mode_and_size_come_in(tmp_path):
    red = Image.new("RGB", (300, 200), "red")
    clear = Image.new("RGBA", (50, 90), (255, 0, 0, 0))
    gif = tmp_path / "two.webp"
    red.save(gif, save_all=True, append_images=[Image.new("RGB", (300, 200), "blue")])
    deep = Image.fromarray((np.arange(128 * 140).reshape(140, 128) * 3).astype(np.uint16))
    for picture in (red, red.convert("L"), red.convert("P"), red.convert("CMYK"), red.convert("1"), deep, gif, clear):
        x = to_tensor([open_picture(picture)], 128)
        assert x.shape == (1, 3, 128, 128)
        assert -1 <= x.min() <= x.max() <= 1
    assert to_tensor([open_picture(clear)], 128).eq(1).all()  # transparency lies on white
    assert to_tensor([open_picture(gif)], 128)[0, 0].mean() > 0.9  # the first frame


def test_rotation_in_the_file_is_obeyed(tmp_path):
    picture = Image.new("RGB", (128, 128), "black")
    picture.paste("white", (0, 0, 128, 64))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    assert to_tensor([open_picture(tmp_path / "turned.png")], 128)[0, :, 100].mean() > 0.9


def test_a_picture_of_the_right_size_is_unchanged(pictures):
    want = torch.from_numpy(np.asarray(pictures[0])).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(to_tensor(pictures[:1], 128)[0], want)


def test_what_is_no_picture_is_an_error(tmp_path):
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        open_picture(tmp_path / "text.png")
    with pytest.raises(UserError, match="no picture at"):
        open_picture(tmp_path / "nothing.png")


# ---- reading --------------------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_their_batch(reader, pictures):
    questions = ["how many cats are there?", "what style is this?", "is there a car in the picture?"]
    together = reader.answer(pictures, questions)
    assert together == [reader.answer([p], [q])[0] for p, q in zip(pictures, questions, strict=True)]
    assert len(reader.describe(pictures)) == 3


def test_answers_are_the_likeliest_words_read_at_once(reader, pictures):
    """Against one pass over question and answer together, without any cache."""
    question = "what colour is the cat?"
    said = reader(pictures[0], question, max_words=6).answers[0]
    tokens = reader.understanding_tokens(to_tensor(pictures[:1], 128))
    dialogue = Dialogue(reader.text_tokenizer).user(question, None)
    prompt = len(dialogue)
    dialogue.says(said)
    logits, _ = reader.trunk.read(torch.tensor([dialogue.ids]), None, tokens)
    best = logits[0, prompt - 1 : -1, : len(reader.text_tokenizer)].argmax(-1)
    assert best[: len(best) - 1].tolist() == dialogue.ids[prompt:-1][: len(best) - 1]


def test_the_picture_matters(reader, pictures):
    a, b = (reader.understanding_tokens(to_tensor([p], 128)) for p in pictures[:2])
    assert not torch.allclose(a, b, atol=1e-3)


def test_what_cannot_be_asked_is_named(reader, pictures):
    with pytest.raises(UserError, match="3 pictures and 2 questions"):
        reader(pictures, ["what is it?", "what is it?"])
    with pytest.raises(UserError, match="the prompt is empty"):
        reader(pictures[0], " ")
    with pytest.warns(UserWarning, match="does not know the word 'zeppelin'"):
        reader(pictures[0], "is there a zeppelin?")


# ---- editing --------------------------------------------------------------------------------------------------------


def edited(editor, picture, words="make the cat blue", **options) -> torch.Tensor:
    options = {"generator": seeded(7)[0], "num_inference_steps": 3, "output_type": "pt"} | options
    return editor(picture, words, **options).images


def test_words_and_source_matter_and_seeds_repeat(editor, pictures):
    first = edited(editor, pictures[0])
    assert first.shape == (1, 3, 128, 128)
    assert torch.equal(first, edited(editor, pictures[0]))
    assert not torch.equal(first, edited(editor, pictures[1]))
    assert not torch.equal(first, edited(editor, pictures[0], "delete the cat"))
    assert not torch.equal(first, edited(editor, pictures[0], generator=seeded(8)[0]))
    both = edited(editor, pictures[:2], ["make the cat blue"] * 2, generator=seeded(7, 7))
    assert (both[:1] - first).abs().max() <= 2 / 255


@pytest.mark.parametrize("mode", ["flow", "codes"])
def test_outside_the_mask_every_pixel_stays(editor, pictures, mode):
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (10, 20, 70, 60))
    out = edited(editor, pictures[0], mask_image=mask, mode=mode)[0]
    source = torch.from_numpy(np.asarray(pictures[0])).permute(2, 0, 1).float() / 255
    inside = torch.zeros(128, 128, dtype=torch.bool)
    inside[20:60, 10:70] = True
    assert torch.equal((out * 255).round()[:, ~inside], (source * 255).round()[:, ~inside])
    assert not torch.equal(out[:, inside], source[:, inside])


def test_guidance_of_text_and_picture_is_the_three_way_sum(editor, pictures):
    """One step by hand, from velocities computed one branch at a time."""
    words, source = "make the cat blue", to_tensor(pictures[:1], 128)
    clean = editor.autoencoder.encode(source)
    tokens = editor.understanding_connector(editor.understanding_encoder(source)[1])
    x, sigma = torch.randn(1, 16, 8, 8), torch.tensor([0.7])

    def velocity(cache):
        return editor.velocity_decoder(x, sigma, editor.trunk(x, sigma, cache, "flow"))

    full, pictured, nothing = (
        velocity(editor._prompt_cache([w], tokens if seen else None, clean if seen else None))
        for w, seen in ((words, True), ("", True), ("", False))
    )
    want = nothing + 1.5 * (pictured - nothing) + 4.0 * (full - pictured)
    tokens = editor.understanding_encoder(source.to(editor.understanding_encoder.dtype))[1]
    branches = editor._edit_branches([words], [""], tokens, clean, 1, 4.0, 1.5)
    features = editor.trunk(x.repeat(3, 1, 1, 1), sigma.repeat(3), branches.cache, "flow")
    got = branches.mix(editor.velocity_decoder(x.repeat(3, 1, 1, 1), sigma.repeat(3), features), 4.0)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_wrong_edits_are_named(editor, pictures):
    with pytest.raises(UserError, match="the mask is 64 x 64 and the picture 128 x 128; give a mask of"):
        edited(editor, pictures[0], mask_image=Image.new("L", (64, 64), 255))
    with pytest.raises(UserError, match="black everywhere"):
        edited(editor, pictures[0], mask_image=Image.new("L", (128, 128), 0))
    with pytest.raises(UserError, match="2 pictures and 1 instruction"):
        edited(editor, pictures[:2], ["make it blue"])
    with pytest.raises(UserError, match="image_guidance_scale is -1"):
        edited(editor, pictures[0], image_guidance_scale=-1)


# ---- folders and commands -------------------------------------------------------------------------------------------


def test_one_folder_serves_drawing_reading_and_editing(folder, reader, pictures, tmp_path):
    draws = TextToImagePipeline.from_pretrained(folder)
    assert draws.trunk.config.reads
    again = UnderstandingPipeline.from_pretrained(folder)
    assert again.answer(pictures[:1], ["what is it?"]) == reader.answer(pictures[:1], ["what is it?"])
    ImageEditPipeline.from_pretrained(folder)


def test_describe_and_edit_commands(folder, pictures, tmp_path, cli):
    file = tmp_path / "cat.png"
    pictures[0].save(file)
    done = cli("describe", file, "--ask", "what is it?", "--model", folder, "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows[0]["answer"] == done.stdout.strip()
    out = tmp_path / "new" / "edited.png"
    words = ("edit", file, "make the cat blue", "-o", out, "--model", folder, "--steps", 2, "--seed", 5)
    assert cli(*words).returncode == 0
    assert json.loads(Image.open(out).info["mm"])["seed"] == 5
    for wrong, text in (
        (words, "exists; choose another name"),
        (("describe", tmp_path / "none.png", "--model", folder), "no picture at"),
        (("edit", file, "", "-o", tmp_path / "x.png", "--model", folder), "instruction is empty"),
    ):
        failed = cli(*wrong)
        assert failed.returncode == 1
        assert text in failed.stderr.splitlines()[-1]
        assert "Traceback" not in failed.stderr
