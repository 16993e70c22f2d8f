"""The commands on diffusers' own pipelines, in this process: options, files, settings, wrong input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from engine_matrix import Model, apart, mask, source_picture
from PIL import Image
from typer.testing import CliRunner

import mm.cli
from mm.core.png_settings import read_settings, to_a1111

SMALL = ("--size", "32x32", "--steps", "2", "--seed", "5")


def run(*words):
    return CliRunner().invoke(mm.cli.app, [str(word) for word in words])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models by name, each loaded once by the commands."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name in ("stable-diffusion-xl", "flux", "flux-kontext", "stable-diffusion"):
        (root / name).mkdir()
        made[name] = Model(name, root / name)
    return made


@pytest.fixture(scope="module")
def xl(models):
    return models["stable-diffusion-xl"]


@pytest.mark.parametrize("name", ["stable-diffusion-xl", "flux"])
def test_command_python_and_batch_draw_the_same(models, name, tmp_path):
    model = models[name]
    done = run("generate", "a red fox", "-n", 3, "--model", model.folder, *SMALL, "-o", tmp_path / "command")
    assert done.exit_code == 0, done.output
    engine = model.engine
    alone = [np.asarray(engine.draw("a red fox", seed=5 + k, steps=2, size=(32, 32))[0]).astype(int) for k in range(3)]
    body = {"prompt": "a red fox", "n": 3, "seed": 5, "steps": 2, "size": "32x32"}
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps({"custom_id": "a", "task": "generate", "body": body}) + "\n")
    done = run("batch", jobs, "-o", tmp_path / "batch", "--model", model.folder, "--batch-size", 8)
    assert done.exit_code == 0, done.output
    for k in range(3):
        (drawn,) = (tmp_path / "batch").glob(f"00000/*-a-{k}-*.png")
        assert apart(pixels(tmp_path / "command" / f"0000{k}.png"), alone[k]) <= 2
        assert apart(pixels(drawn), alone[k]) <= 2
        assert read_settings(drawn)["prompt"] == "a red fox"


def test_a_picture_is_drawn_again_from_its_settings(xl, tmp_path):
    """Bit for bit, with all that it depends on: LoRA, size, negative prompt, scheduler, and the others of its call."""
    file, layers = xl.lora
    done = run(
        "generate", "a (red:1.3) {fox|fox}", "-n", 2, "--model", xl.folder, *SMALL, "--negative", "bad", "--scheduler",
        "ddim", "--lora", f"{file}:0.5", "--set", "clip_skip=1", "-o", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"style.safetensors: {layers} of {layers} layers, scale 0.5" in done.stderr
    settings = read_settings(tmp_path / "00001.png")
    assert settings["negative_prompt"] == "bad"
    assert settings["scheduler"] == "DDIMScheduler"
    assert settings["adapters"] == [{"file": str(file), "scale": 0.5}]
    assert settings["options"] == {"clip_skip": 1}
    again = run("generate", "--like", tmp_path / "00001.png", "-o", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    assert apart(pixels(tmp_path / "00001.png"), pixels(tmp_path / "again.png")) == 0
    other = run("generate", "--like", tmp_path / "00001.png", "--seed", 9, "-o", tmp_path / "other.png")
    assert other.exit_code == 0, other.output
    assert apart(pixels(tmp_path / "00001.png"), pixels(tmp_path / "other.png")) > 2


def test_settings_of_other_programs_draw(xl, tmp_path):
    settings = {
        "prompt": "a fox <lora:style:0.5>",
        "negative_prompt": "bad <lora:x:1>",
        "seed": 7,
        "steps": 2,
        "guidance": 4.0,
    }
    theirs = tmp_path / "theirs.png"
    text = to_a1111(settings).replace("Steps: 2", "Steps: 2, Sampler: Euler a, Size: 32x32")
    chunks = Image.new("RGB", (8, 8))
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    chunks.save(theirs, pnginfo=info)
    no_model = run("generate", "--like", theirs, "-o", tmp_path / "x.png")
    assert no_model.exit_code == 1
    assert "give it with --model" in no_model.stderr
    done = run("generate", "--like", theirs, "--model", xl.folder, "-o", tmp_path / "x.png")
    assert done.exit_code == 0, done.output
    assert "LoRA style at 0.5" in done.stderr
    mine = read_settings(tmp_path / "x.png")
    assert (mine["prompt"], mine["scheduler"], mine["guidance"]) == ("a fox", "EulerAncestralDiscreteScheduler", 4.0)
    assert (mine["width"], mine["height"], mine["negative_prompt"]) == (32, 32, "bad")


def test_pictures_from_pictures(models, tmp_path):
    model = models["stable-diffusion"]
    source_picture().resize((50, 45)).save(tmp_path / "a.png")
    mask().resize((50, 45)).save(tmp_path / "m.png")
    words = ("generate", "a fox", "--model", model.folder, "--steps", 4, "--seed", 1, "--image", tmp_path / "a.png")
    done = run(*words, "--strength", 0.5, "-o", tmp_path / "b.png")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "b.png").size == (48, 40)  # the source's, in multiples of 8
    assert "so it is scaled to 48 x 40" in done.stderr
    assert read_settings(tmp_path / "b.png")["source"] == "a.png"
    done = run(*words, "--mask", tmp_path / "m.png", "-o", tmp_path / "c.webp")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "c.webp").format == "WEBP"
    again = run("generate", "--like", tmp_path / "b.png", "-o", tmp_path / "d.png")
    assert again.exit_code == 1
    assert "was drawn from another one (a.png); give it with --image" in again.stderr
    again = run("generate", "--like", tmp_path / "b.png", "--image", tmp_path / "a.png", "-o", tmp_path / "d.png")
    assert again.exit_code == 0, again.output
    assert apart(pixels(tmp_path / "b.png"), pixels(tmp_path / "d.png")) == 0


def test_an_edit_writes_what_its_name_says(models, tmp_path):
    model = models["flux-kontext"]
    source_picture().save(tmp_path / "a.png")
    small = ("--set", "_auto_resize=false", "--set", "max_area=1024", "--size", "32x32", "--steps", "2")
    words = ("edit", tmp_path / "a.png", "a fox", "--model", model.folder, *small)
    done = run(*words, "-o", tmp_path / "b.jpg")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "b.jpg").format == "JPEG"
    assert "exists" in run(*words, "-o", tmp_path / "b.jpg").stderr
    assert run(*words, "-o", tmp_path / "b.jpg", "--force").exit_code == 0
    assert "are written as .png" in run(*words, "-o", tmp_path / "b.gif").stderr


def test_wildcards_and_matrix(xl, tmp_path):
    (tmp_path / "animals.txt").write_text("# a comment\nfox\n\nowl\n")
    done = run(
        "generate", "a __animals__ | at {night|noon}", "--matrix", "--wildcards", tmp_path, "--model", xl.folder,
        *SMALL, "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    prompts = [read_settings(path)["prompt"] for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len(prompts) == 2
    assert prompts[0] in ("a fox", "a owl")
    assert prompts[1].endswith(("night", "noon"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("x", "--size", "33x32"), "takes multiples of 8, for example 32 x 32"),
        (("x", "--size", "3y"), "size is '3y'"),
        (("x", "--scheduler", "magic"), "scheduler is 'magic'; "),
        (("x", "--mode", "codes"), "has no modes; leave it out"),
        (("x", "--best-of", "3"), "does not read what it drew"),
        (("x", "--lora", "none.safetensors:0.5"), "there is no adapter file none.safetensors"),
        (("x", "--lora", "~nobody-of-this-name/x:0.5"), "there is no adapter file ~nobody-of-this-name/x"),
        (("x", "--set", "clip_skip"), "give NAME=VALUE"),
        (("x", "--set", "nothing=1"), "takes no nothing; it takes"),
        (("x", "--mask", "MASK"), "mask is given without image"),
        (("x", "--strength", "0.5"), "without image"),
        (("x", "--negative", "y", "--guidance", "1"), "acts only with guidance above 1"),
        (("x", "-n", "2", "-o", "x.png"), "is one file and 2 pictures are wanted"),
        ((), "there is no prompt"),
        (("x", "--wildcards", "nowhere"), "no folder nowhere"),
        (("a __dog__",), "no folder of wildcard files is given"),
        (("x", "--like", "MASK"), "carries no settings"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(xl, tmp_path, words, says):
    mask().save(tmp_path / "mask.png")
    words = [tmp_path / "mask.png" if word == "MASK" else word for word in words]
    out = () if "-o" in words else ("-o", tmp_path / "out")
    done = run("generate", *words, "--model", xl.folder, *out)
    assert done.exit_code == 1
    assert says in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_distilled_guidance_takes_a_negative_prompt_with_true_guidance_alone(models, tmp_path):
    words = ("generate", "x", "--negative", "y", "--model", models["flux"].folder, *SMALL, "-o", tmp_path)
    done = run(*words)
    assert done.exit_code == 1
    assert "--set true_cfg_scale=4" in done.stderr
    assert run(*words, "--set", "true_cfg_scale=4").exit_code == 0


def test_rows_name_what_a_picture_is_drawn_with(models, tmp_path):
    xl, file = models["stable-diffusion-xl"], models["stable-diffusion-xl"].lora[0]
    root = file.parents[1]
    source_picture().save(root / "source.png")
    mask().save(root / "mask.png")
    common = {"prompt": "a fox", "seed": 5, "steps": 2, "size": "32x32"}
    bodies = {
        "plain": {},
        "negative": {"negative": "bad"},
        "lora": {"lora": f"stable-diffusion-xl/{file.name}:0.7"},
        "image": {"image": "source.png", "strength": 0.5},
        "inpaint": {"image": "source.png", "mask": "mask.png"},
        "model": {"model": "stable-diffusion/plain"},
        "scheduler": {"scheduler": "ddim"},
    }
    wrong = {
        "size": ({"size": "33x32"}, "multiples of 8"),
        "out": ({"image": "../../etc/passwd"}, "leads out of"),
        "gone": ({"lora": "gone.safetensors"}, "there is no lora"),
        "mode": ({"mode": "codes"}, "has no modes"),
        "hub": ({"model": "owner/name"}, "there is no model"),
        "misfit": ({"model": "stable-diffusion/plain", "lora": "flux/style.safetensors"}, ""),
    }
    models["stable-diffusion"].folder, models["flux"].lora  # written by now
    rows = [{"custom_id": k, "task": "generate", "body": common | more} for k, more in bodies.items()]
    rows += [{"custom_id": k, "task": "generate", "body": common | more} for k, (more, _) in wrong.items()]
    jobs = root / "rows.jsonl"
    jobs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dry = run("batch", jobs, "-o", tmp_path / "out", "--model", xl.folder, "--dry-run")
    assert dry.exit_code == 2
    assert "13 rows" in dry.stdout
    assert "5 failed" in dry.stdout  # whether a LoRA fits is known with the weights alone
    assert not (tmp_path / "out").exists()
    done = run("batch", jobs, "-o", tmp_path / "out", "--model", xl.folder)
    assert "7 drawn, 0 there, 6 failed" in done.stdout, done.output
    for name, (_, says) in wrong.items():
        assert any(name in line and says in line for line in done.stderr.splitlines()), name
    drawn = {name: pixels(next((tmp_path / "out").glob(f"00000/*-{name}-0-*.png"))) for name in bodies}
    assert all(apart(drawn["plain"], other) > 0 for name, other in drawn.items() if name != "plain")
    single = run("generate", "a fox", "--model", xl.folder, *SMALL, "--lora", f"{file}:0.7", "-o", tmp_path / "l.png")
    assert single.exit_code == 0, single.output
    assert apart(drawn["lora"], pixels(tmp_path / "l.png")) == 0
    again = run("batch", jobs, "-o", tmp_path / "out", "--model", xl.folder)
    assert "0 drawn, 7 there, 6 failed" in again.stdout


def test_describe_answers_for_the_good_ones(tmp_path):
    Image.new("RGB", (128, 128), "green").save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = run("describe", tmp_path / "a.png", tmp_path / "bad.png", "--json", tmp_path / "out.json")
    assert done.exit_code == 1
    assert done.stdout.startswith(f"{tmp_path / 'a.png'}: ")
    assert "bad.png cannot be read" in done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["question"] == "describe the picture"
    public = run("describe", tmp_path / "a.png", "--model", tmp_path)
    assert public.exit_code == 1


def test_a_model_that_only_draws_says_so(xl, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for words in (
        ("describe", tmp_path / "a.png"),
        ("edit", tmp_path / "a.png", "x", "-o", tmp_path / "b.png"),
        ("chat",),
    ):
        done = run(*words, "--model", xl.folder)
        assert done.exit_code == 1
        assert "it can: draw, image to image, inpaint" in done.stderr
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("command", ["compose", "edit", "chat", "erase", "customize"])
def test_evaluations_say_of_a_public_model_that_it_draws_no_world(xl, tmp_path, command, monkeypatch):
    """Before anything is trained or drawn."""
    monkeypatch.chdir(tmp_path)
    done = run("eval", command, *(["wolf"] if command == "erase" else []), "--limit", 1, "--model", xl.folder)
    assert done.exit_code == 1 and "is no model of mm's world" in done.output.splitlines()[-1], done.output
    assert not list(tmp_path.iterdir())


def test_quantized_is_replaced():
    done = run("generate", "x", "--quantized")
    assert done.exit_code == 2
    assert "--bits 4" in done.stderr


def test_doctor_estimates_a_model(xl, tmp_path):
    done = run("doctor", xl.folder, "--json", tmp_path / "advice.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "advice.json").read_text())
    count = sum(p.numel() for part in xl.engine.pipeline.components.values() if hasattr(part, "parameters")
                for p in part.parameters())  # fmt: skip
    assert abs(found["sixteen"] - 2 * count) < 0.02 * found["sixteen"]
    assert found["four"] < found["sixteen"] < found["loaded"]
    assert (found["family"], found["dtype"]) == ("stable-diffusion-xl", "float32")
    assert "image_to_image" in found["tasks"]


def test_training_starts_with_a_model_named_alone():
    done = run("train")
    assert done.exit_code == 2
    assert "Usage: mm train" in done.output
