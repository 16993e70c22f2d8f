"""What the engine knows of a model before it draws, and the requests and models that it refuses."""

from __future__ import annotations

import pytest
from PIL import Image

import mm
from mm.core.errors import UserError
from mm.engine import memory
from mm.engine.capabilities import Capabilities
from mm.engine.facts import capabilities_of
from mm.engine.outline import capabilities_at
from mm.engine.requests import Describe, Draw, Edit
from mm.engine.settings import scheduler_named
from mm.families import family_of


def test_capabilities_are_known_without_weights(folders, ours, sdxl):
    for name, engine in (("ours", ours), ("sdxl", sdxl)):
        assert capabilities_at(folders / name, engine.name) == engine.capabilities


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler"),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("ddim", "DDIMScheduler"),
        ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
        ("magic", None),
    ],
)
def test_samplers_of_other_programs_are_known(sdxl, name, kind):
    assert scheduler_named(name, sdxl.capabilities) == kind


@pytest.mark.parametrize(
    ("request_of_it", "message"),
    [
        ({"prompt": "x", "size": (100, 100)}, "draws .* only"),
        ({"prompt": "x", "mode": "magic"}, "mode is 'magic'; .* has the modes flow, codes"),
        ({"prompt": "x", "scheduler": "Nothing"}, "scheduler is 'Nothing'"),
        ({"prompt": "x", "image": Image.new("RGB", (8, 8))}, "cannot draw from a picture; it can: draw"),
        ({"prompt": "x", "steps": 0}, "steps is 0; give a whole number from 1"),
        ({"prompt": "x", "guidance": float("nan")}, "guidance is nan"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x" * 30_000}, "has 30000 characters"),
        ({"prompt": "x", "strength": 0.5}, "without image"),
        ({"prompt": "x", "mask": Image.new("L", (8, 8))}, "without image"),
        (
            {"prompt": "x", "mask": Image.new("L", (8, 16)), "image": Image.new("RGB", (16, 8))},
            "the mask is 8 x 16 and the picture 16 x 8; give both the same shape",
        ),
        (
            {"prompt": "x", "mask": Image.new("RGBA", (8, 8), (255, 255, 255, 0)), "image": Image.new("RGB", (8, 8))},
            "the mask is black everywhere, so nothing may change",
        ),
        ({"prompt": "a fox <lora:style:0.8>"}, "prompt holds <lora:style:0.8>, which only A1111 .*--lora FILE:SCALE"),
        ({"prompt": "x", "negative": "<lyco:bad>"}, "negative holds <lyco:bad>"),
        ({"prompt": 7}, "prompt is 7; give a text"),
        ({"prompt": "x", "options": {"prompt": "y"}}, "options hold prompt = 'y', which the request's prompt decides"),
        ({"prompt": "x", "options": {"num_images_per_prompt": 2}}, "the request's count decides"),
        ({"prompt": "x", "options": {"generator": 1}}, "the request's seed decides"),
        ({"prompt": "x", "steps": 2, "options": {"num_inference_steps": 3}}, "the request's steps decides"),
        ({"prompt": "x", "guidance": 2.0, "options": {"guidance_scale": 3}}, "the request's guidance decides"),
        ({"prompt": "x", "mode": "flow", "options": {"mode": "codes"}}, "the request's mode decides"),
    ],
)
def test_wrong_requests_are_named_before_anything_is_drawn(ours, request_of_it, message):
    with pytest.raises(UserError, match=message):
        ours.run(Draw(**request_of_it))


def test_options_may_set_what_the_request_leaves_open(ours):
    ours.run(Draw(prompt="x", options={"num_inference_steps": 3, "guidance_scale": 2, "mode": "codes"}))


@pytest.mark.parametrize(("name", "option"), [("sdxl", "guidance_rescale"), ("ours", "temperature")])
def test_an_option_of_the_wrong_type_is_named(request, name, option):
    engine = request.getfixturevalue(name)
    with pytest.raises(UserError, match=f"{option} is 'abc'; .* takes a number"):
        engine.draw("a cat", steps=1, options={option: "abc"})


def test_wrong_options_end_before_a_copy_of_few_bits_is_made(folders, monkeypatch):
    def quantized(*_arguments):
        raise AssertionError("a copy was made")

    monkeypatch.setattr("mm.engine.loading._quantized", quantized)
    with pytest.raises(UserError, match="offload is 'sequential'; give auto, none, model, group"):
        mm.load(folders / "ours", bits=4, offload="sequential")
    with pytest.raises(UserError, match="offload is 'model' and the device is the CPU"):
        mm.load(folders / "ours", bits=4, device="cpu", offload="model")
    with pytest.raises(UserError, match="dtype is 'int3'; give auto, float32, bfloat16, float16"):
        mm.load(folders / "ours", bits=4, dtype="int3")


def test_wrong_models_are_named(folders, tmp_path):
    with pytest.raises(UserError, match="no model 'nothing'"):
        mm.load("nothing")
    with pytest.raises(UserError, match="bits is 3"):
        mm.load(folders / "ours", bits=3)
    with pytest.raises(UserError, match="device is 'tpu'"):
        mm.load(folders / "ours", device="tpu")
    with pytest.raises(UserError, match="dtype is 'int3'"):
        mm.load(folders / "ours", dtype="int3")
    with pytest.raises(UserError, match="offload is 'model'"):
        mm.load(folders / "ours", device="cpu", offload="model")
    (tmp_path / "x.ckpt").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"no safetensors file"):
        mm.load(tmp_path / "x.ckpt")


def test_an_estimate_counts_the_weights(folders):
    engine = mm.load(folders / "sdxl", dtype="float32")
    found = memory.estimate(folders / "sdxl")
    count = sum(
        p.numel()
        for part in engine.pipeline.components.values()
        if hasattr(part, "parameters")
        for p in part.parameters()
    )
    assert abs(found.sixteen - 2 * count) < 0.02 * found.sixteen
    assert found.four < found.sixteen
    assert memory.choose_offload(10, 5, 1 << 40)[0] == "none"
    assert memory.choose_offload(30 << 30, 8 << 30, 16 << 30)[0] == "model"
    assert memory.choose_offload(60 << 30, 40 << 30, 16 << 30)[0] == "group"


def test_a_strength_that_leaves_no_step_is_refused(sdxl):
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(UserError, match=r"a strength of 0.2 leaves none of 4 steps; give a strength of at least 0.25"):
        sdxl.draw("a fox", image=picture, strength=0.2, steps=4, seed=1)


def test_capabilities_of_an_unknown_pipeline_come_from_its_call():
    class Unknown:
        def __call__(self, prompt, height=None, width=None, guidance_scale=3.0, num_inference_steps=9): ...

    can = capabilities_of("unknown", Unknown(), None)
    assert can.tasks == ("draw",)
    assert (can.guidance_name, can.negative, can.fixed_size) == ("guidance_scale", False, False)
    with pytest.raises(UserError, match="takes no negative prompt"):
        can.check(Draw(prompt="x", negative="y"))
    with pytest.raises(UserError, match="cannot edit by an instruction"):
        can.check(Edit(image=Image.new("RGB", (8, 8)), instruction="x"))
    with pytest.raises(UserError, match="cannot read pictures"):
        Capabilities(model="m", tasks=("draw",)).check(Describe(image=Image.new("RGB", (8, 8))))


def test_families_give_defaults(ours, sdxl):
    assert (ours.capabilities.steps["codes"], ours.capabilities.guidance) == (32, 5.5)
    assert family_of(sdxl.pipeline).name == "stable-diffusion-xl"
    assert sdxl.capabilities.negative
