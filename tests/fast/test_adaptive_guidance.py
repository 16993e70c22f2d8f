"""Adaptive Guidance on tiny random pipelines of diffusers' real classes."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import draw_with, tiny_pipeline_of
from torch import nn

from mm.core.errors import UserError
from mm.fast import AdaptiveGuidance, GuidanceGate, adaptive_guidance
from mm.fast.guidance import adaptive_settings
from mm.fast.rows import selected

STEPS = 5
# one call on both halves, unconditional first; the same with learned variances; lists of pictures, conditional first;
# two calls; two calls with a renormalized mixture
GUIDED = ("stable-diffusion", "pixart-sigma", "z-image", "chroma", "qwen-image")


def drawn(name: str, pipe: Any, settings: AdaptiveGuidance | None, **more: Any) -> tuple[torch.Tensor, Any]:
    more = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(7)} | more
    if name == "qwen-image":
        more["true_cfg_scale"] = 4.0
    if settings is None:
        return draw_with(name, pipe, **more), None
    with adaptive_guidance(pipe, settings) as report:
        return draw_with(name, pipe, **more), report


def counted(pipe: Any) -> list[int]:
    """Rows of each call of the denoiser, by a hook of torch."""
    rows: list[int] = []
    denoiser = getattr(pipe, "transformer", None) or pipe.unet

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    denoiser.register_forward_pre_hook(count, with_kwargs=True)
    return rows


@pytest.mark.parametrize("name", GUIDED)
def test_a_threshold_above_one_changes_no_bit_and_a_low_one_halves_the_work(name: str):
    pipe = tiny_pipeline_of(name)
    config, rows = dict(pipe.config), counted(pipe)
    plain, _ = drawn(name, pipe, None)
    assert sum(rows) == 2 * STEPS
    rows.clear()
    same, report = drawn(name, pipe, AdaptiveGuidance(threshold=1.5))
    assert torch.equal(same, plain)
    assert report.guided and sum(rows) == report.rows == report.full_rows == 2 * STEPS == 2 * report.steps
    rows.clear()
    cut, report = drawn(name, pipe, AdaptiveGuidance(threshold=-1))  # the first step decides, so one keeps guidance
    assert sum(rows) == report.rows == STEPS + 1 and report.full_rows == 2 * STEPS
    assert 0 < float((cut - plain).abs().max())
    again, _ = drawn(name, pipe, None)  # nothing is left on the pipeline
    assert torch.equal(again, plain)
    assert dict(pipe.config) == config and "step" not in vars(pipe.scheduler)


def test_what_is_left_is_the_conditional_prediction_as_in_a_call_that_turns_guidance_off():
    """diffusers' own recipe: a callback that ends guidance and drops the unconditional half of the embeddings."""
    name = "stable-diffusion"
    pipe = tiny_pipeline_of(name)

    def end(pipe: Any, step: int, _: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step == 0:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    wanted = draw_with(
        name, pipe, num_inference_steps=STEPS, callback_on_step_end=end,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )  # fmt: skip
    got, _ = drawn(name, pipe, AdaptiveGuidance(threshold=-1))
    assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["sana", "chroma"])
def test_regression_stays_nearer_to_full_guidance_than_leaving_it_out(name: str):
    pipe = tiny_pipeline_of(name)
    plain, _ = drawn(name, pipe, None, num_inference_steps=8)
    dropped, few = drawn(name, pipe, AdaptiveGuidance(threshold=-1), num_inference_steps=8)
    linear, some = drawn(name, pipe, AdaptiveGuidance(threshold=-1, linear=True), num_inference_steps=8)
    half, more = drawn(name, pipe, AdaptiveGuidance(threshold=1.5, linear=True), num_inference_steps=8)
    assert (few.rows, some.rows, more.rows) == (9, 10, 13)  # full steps: 0; 0, 1; 0, 1, 3, 5, 7
    distances = [float((one - plain).square().mean()) for one in (half, linear, dropped)]
    assert distances == sorted(distances) and distances[1] < 0.5 * distances[2]


def test_pictures_of_a_batch_are_decided_on_their_own():
    name = "stable-diffusion"
    pipe = tiny_pipeline_of(name)
    prompts, seeds = ["a red fox", "a blue house"], (3, 4)
    settings = AdaptiveGuidance(threshold=0.99)
    singles, works = [], []
    for prompt, seed in zip(prompts, seeds, strict=True):
        picture, report = drawn(name, pipe, settings, prompt=prompt, generator=torch.Generator().manual_seed(seed))
        singles.append(picture)
        works.append(report.rows)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    together, report = drawn(name, pipe, settings, prompt=prompts, generator=generators)
    assert (together - torch.cat(singles)).abs().max() < 2 / 255
    assert report.rows == sum(works)


def test_distilled_guidance_leaves_nothing_out_and_says_so():
    pipe = tiny_pipeline_of("flux")
    plain, _ = drawn("flux", pipe, None)
    same, report = drawn("flux", pipe, AdaptiveGuidance(threshold=-1))
    assert torch.equal(same, plain) and not report.guided and report.rows == report.full_rows == STEPS
    true, report = drawn("flux", pipe, AdaptiveGuidance(threshold=-1), true_cfg_scale=3.0, negative_prompt="blue")
    assert report.guided and report.rows == STEPS + 1
    assert not torch.equal(true, plain)


def test_guidance_by_three_predictions_is_refused():
    sd = tiny_pipeline_of("stable-diffusion")
    unet = diffusers.UNet2DConditionModel.from_config(sd.unet.config, in_channels=8)
    parts = {key: part for key, part in sd.components.items() if key not in ("unet", "image_encoder")}
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        **parts, unet=unet, image_encoder=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="rows a step for 1 picture"):
        with adaptive_guidance(pipe):
            pipe("a red fox", image=image, num_inference_steps=2, output_type="pt")
    assert pipe.unet is unet


def test_a_pipeline_without_a_denoiser_and_wrong_settings_are_refused():
    with pytest.raises(UserError, match="no denoiser"), adaptive_guidance(object()):
        pass
    for wrong, said in (({"threshold": 3}, "threshold is 3"), ({"treshold": 1}, "no setting 'treshold'"),
                        ({"threshold": "high"}, "threshold is 'high'"), ({"linear": 1}, "linear is 1")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            adaptive_settings(None, wrong)
    assert adaptive_settings(None, {"linear": True}) == {"threshold": 0.991, "linear": True}


def test_linear_predictions_are_those_of_least_squares():
    """Against torch's own least squares on made-up predictions that follow a known combination."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(3, 2, 50, generator=generator) for _ in range(2))
    gate = GuidanceGate(AdaptiveGuidance(threshold=1.5, linear=True), 2)
    for step in range(2):
        assert gate.needed().all()
        gate.complete(cond[step], uncond[step], gate.needed())
    assert not gate.needed().any()
    got = gate.complete(cond[2], None, gate.needed())
    for picture in range(2):
        before = [cond[1, picture], cond[0, picture], uncond[0, picture]]
        weights = torch.linalg.lstsq(torch.stack(before, 1), uncond[1, picture, :, None]).solution
        now = [cond[2, picture], cond[1, picture], uncond[1, picture]]
        assert torch.allclose(got[picture], (torch.stack(now, 1) @ weights)[:, 0], atol=1e-3)


def test_rows_are_taken_of_tensors_lists_and_nests():
    x, rows = torch.arange(12).view(4, 3), torch.tensor([1, 3])
    taken = selected({"a": x, "b": [x, x], "c": torch.zeros(1), "d": [7, 8, 9, 10], "e": 0.5}, rows, 4, lists=False)
    assert torch.equal(taken["a"], x[rows]) and torch.equal(taken["b"][1], x[rows])
    assert taken["c"].shape == (1,) and taken["d"] == [8, 10] and taken["e"] == 0.5
    pictures = [torch.full((4, 2), k) for k in range(4)]  # each has 4 channels: a list has a picture for each row
    assert [int(one[0, 0]) for one in selected(pictures, rows, 4, lists=True)] == [1, 3]
