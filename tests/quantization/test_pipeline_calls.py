"""Calibration on pipelines that take more than a prompt: arguments by keyword, what is missing made or named."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import tiny_calibration as tiny
import torch

import mm
from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear
from mm.quantization import pictures, pipeline_calls
from mm.quantization.config import SVDQuantConfig

QUICK = SVDQuantConfig(rank=2, iterations=2, rows=64, calls=2, steps=2, size=32)
PROMPTS = ["a red cat", "two blue dogs"]


def _pipelines() -> list[type]:
    names = [name for name in dir(diffusers) if name.endswith("Pipeline") and name != "DiffusionPipeline"]
    found = [getattr(diffusers, name) for name in names if "Onnx" not in name and "Flax" not in name]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)]


def test_every_pipeline_of_diffusers_gets_what_its_signature_asks_or_an_error_that_names_it():
    called, refused = 0, {}
    for kind in _pipelines():
        pipe = type(kind.__name__, (), {"__call__": kind.__call__})()
        takes = pipeline_calls.parameters(pipe)
        needed = {
            n for n, p in takes.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        try:
            made = pipeline_calls.arguments_for(pipe, {"prompt": "a cat"}, QUICK, 0)
        except UserError as error:
            missing = str(error).split(" needs ")[1].split(", which")[0].split(", ")
            assert set(missing) <= needed
            refused[kind.__name__] = missing
            continue
        assert needed <= set(made), kind
        called += 1
    assert called > 200
    made_up = {name for names in refused.values() for name in names}
    assert not made_up & {"image", "mask_image", "video", "prompt", "control_image"}, refused


def test_a_first_argument_other_than_the_prompt_gets_a_picture_of_its_own():
    kinds = (
        "FluxKontextPipeline",
        "QwenImageEditPipeline",
        "Flux2Pipeline",
        "FluxFillPipeline",
        "WanVideoToVideoPipeline",
    )
    for name in kinds:
        pipe = type(name, (), {"__call__": getattr(diffusers, name).__call__})()
        made = pipeline_calls.arguments_for(pipe, {"prompt": "a cat"}, QUICK, 0)
        assert made["prompt"] == "a cat"
        picture = made["video"][0] if "video" in made else made["image"]
        assert picture.size == (32, 32)
        assert ("mask_image" in made) == ("Fill" in name)
    qwen = type("QwenImagePipeline", (), {"__call__": diffusers.QwenImagePipeline.__call__})()
    for number in (0, 1):  # its second branch of guidance needs a negative prompt
        assert pipeline_calls.arguments_for(qwen, {"prompt": "a cat"}, QUICK, number)["negative_prompt"]


def test_made_pictures_have_the_spectrum_of_photographs():
    made = torch.stack(
        [torch.frombuffer(bytearray(pictures.picture(k, 64, 64).tobytes()), dtype=torch.uint8) for k in range(8)]
    )
    grey = made.view(8, 64, 64, 3).float().mean(-1)
    power = torch.fft.rfft2(grey - grey.mean((1, 2), keepdim=True)).abs().square().mean(0)
    distance = (torch.fft.fftfreq(64)[:, None].square() + torch.fft.rfftfreq(64).square()).sqrt()
    low, high = (power[(distance > a) & (distance < b)].mean() for a, b in ((0.02, 0.06), (0.2, 0.4)))
    assert low / high > 20  # white noise gives 1; amplitudes that fall as 1 / f give some 50
    assert pictures.picture(3, 64, 48).tobytes() == pictures.picture(3, 64, 48).tobytes()
    assert pictures.picture(3, 64, 48).tobytes() != pictures.picture(4, 64, 48).tobytes()
    mask = torch.frombuffer(bytearray(pictures.mask(1, 64, 64).tobytes()), dtype=torch.uint8)
    assert set(mask.tolist()) == {0, 255}
    assert len(pictures.video(0, 16, 16, 9)) == 9


CASES = {
    "img2img": lambda: tiny.sd(),
    "inpaint": lambda: tiny.sd("StableDiffusionInpaintPipeline"),
    "controlnet": lambda: tiny.sd("StableDiffusionControlNetPipeline"),
    "kontext": tiny.kontext,
    "video": tiny.ltx,
}


@pytest.mark.parametrize("name", CASES)
def test_pipelines_that_need_more_than_a_prompt_are_calibrated(name):
    pipe = CASES[name]()
    report = mm.quantize(pipe, QUICK, calibration=PROMPTS, progress=False)
    seen = [layer for layer in report.layers if layer.bits == 4 and not layer.note]
    assert len(seen) > 5
    drawn = pipeline_calls.preview(pipe, PROMPTS[:1], QUICK, "", progress=False)
    assert drawn.shape[1] == 3
    assert len(drawn) == (pipeline_calls.FRAMES if name == "video" else 1)
    assert bool(drawn.isfinite().all())


def test_the_callers_pictures_win_and_unknown_arguments_are_named():
    pipe = tiny.sd()
    seen = []
    pipe.image_processor.preprocess = lambda image, **_: seen.append(image) or torch.zeros(1, 3, 32, 32)
    own = pictures.picture(99, 32, 32)
    pipeline_calls.draw(pipe, {"prompt": "a cat", "image": own}, QUICK, 0)
    assert seen == [own]
    with pytest.raises(UserError, match="takes no imgae"):
        mm.quantize(pipe, QUICK, calibration=[{"prompt": "a cat", "imgae": own}], progress=False)


def test_what_cannot_be_made_is_named_with_the_way_out():
    kind = diffusers.KandinskyV22Pipeline
    pipe = type(
        "KandinskyV22Pipeline", (), {"__call__": kind.__call__, "set_progress_bar_config": lambda *_, **__: None}
    )()
    with pytest.raises(UserError, match=r"needs image_embeds, negative_image_embeds, .* calibration=\["):
        pipeline_calls.draw(pipe, "a cat", QUICK, 0)


def test_few_step_models_keep_their_steps_and_the_models_own_size():
    pipe = tiny.sana_sprint()
    made = pipeline_calls.arguments_for(pipe, {"prompt": "a cat"}, SVDQuantConfig(steps=8), 0)
    assert (
        made["num_inference_steps"] == inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    )
    assert made["height"] == 32 * pipe.vae_scale_factor
    assert made["use_resolution_binning"] is False


def test_results_are_read_by_what_they_hold():
    frames = torch.rand(1, 5, 3, 8, 8)
    assert pipeline_calls.pixels_of(SimpleNamespace(frames=frames)).shape == (5, 3, 8, 8)
    assert pipeline_calls.pixels_of(SimpleNamespace(images=torch.rand(2, 8, 8, 3).numpy())).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="neither images nor frames"):
        pipeline_calls.pixels_of(SimpleNamespace(audios=frames))


def test_time_of_the_search_does_not_grow_with_the_rows_of_a_call():
    """The parent is called at most as often as its rows allow: it was called 158 times a group."""
    pipe = tiny.sdxl()
    calls: dict[str, int] = {}
    for path, module in pipe.unet.named_modules():
        if path.endswith("attn1"):
            module.register_forward_hook(lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1}))
    config = SVDQuantConfig(rank=2, iterations=2, rows=256, steps=2)
    mm.quantize(pipe, config, calibration=PROMPTS, progress=False)
    assert any(isinstance(m, BranchedLinear) for m in pipe.unet.modules())
    drawing = 3 * 2  # one run to count and two to watch, two steps each
    for path, count in calls.items():
        assert count - drawing <= 2 * 24, (path, count)  # two groups have it as their parent: q, k, v and out
