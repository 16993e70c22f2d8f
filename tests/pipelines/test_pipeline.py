"""The pipeline behaves like diffusers' own, and the same seed gives the same picture."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import STEPS, draw, seeded, tiny_pipeline

from mm import TextToImagePipeline
from mm.core.errors import UserError
from mm.models.cache import PromptCache
from mm.pipelines.fast import FULL_CODES
from mm.pipelines.sampling import COOLED, code_steps, masked_steps


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return tiny_pipeline()


@pytest.mark.parametrize("mode", ["flow", "codes"])
def test_same_seed_same_picture_at_any_batch_size_and_place(pipe: TextToImagePipeline, mode: str) -> None:
    alone = draw(pipe, mode=mode)
    others = ["a dog", "a tree at night", "three blue stars", "an owl", "a key, sepia style", "a bus", "one moon"]
    for place in (0, 7):
        prompts = [*others[:place], "two red cats on grass", *others[place:]]
        seeds = [k + 100 for k in range(8)]
        seeds[place] = 7
        batch = draw(pipe, prompts, generator=seeded(*seeds), mode=mode)
        assert (batch[place] - alone[0]).abs().max() < 2 / 255
    assert (batch[0] - alone[0]).abs().max() > 2 / 255


def test_picture_k_of_a_call_has_seed_plus_k(pipe: TextToImagePipeline) -> None:
    three = draw(pipe, num_images_per_prompt=3)
    for k in range(3):
        assert torch.allclose(three[k], draw(pipe, generator=seeded(7 + k)[0])[0], atol=1e-5)
    assert torch.equal(draw(pipe), draw(pipe))
    used = seeded(7)[0]
    torch.rand(5, generator=used)  # only the seed of a generator counts
    assert torch.equal(draw(pipe, generator=used), draw(pipe))


def test_the_last_seed_is_followed_by_zero(pipe: TextToImagePipeline) -> None:
    two = draw(pipe, generator=seeded(2**64 - 1)[0], num_images_per_prompt=2)
    assert torch.allclose(two[1], draw(pipe, generator=seeded(0)[0])[0], atol=1e-5)


def test_noise_of_a_scheduler_belongs_to_the_picture() -> None:
    pipe = tiny_pipeline()
    plain = draw(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    three = draw(pipe, num_images_per_prompt=3)
    assert not torch.allclose(three[0], plain[0], atol=1e-3)
    for k in range(3):
        assert (three[k] - draw(pipe, generator=seeded(7 + k)[0])[0]).abs().max() < 2 / 255


def test_outputs(pipe: TextToImagePipeline) -> None:
    pt = draw(pipe)
    assert pt.shape == (1, 3, 128, 128)
    array = draw(pipe, output_type="np")
    assert np.allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    picture = draw(pipe, output_type="pil")[0]
    assert np.abs(np.asarray(picture) - array[0] * 255).max() <= 0.51
    latents = draw(pipe, output_type="latent")
    assert latents.shape == (1, 16, 8, 8)
    decoded = (pipe.autoencoder.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(decoded, pt, atol=1e-5)
    assert torch.equal(draw(pipe, return_dict=True), pipe("two red cats on grass", generator=seeded(7)[0],
        num_inference_steps=STEPS, output_type="pt", return_dict=False)[0])  # fmt: skip


def test_flow_is_eulers_method_on_guided_velocity(pipe: TextToImagePipeline) -> None:
    """An independent loop: no cache class tricks, one branch at a time, sigmas written out."""
    tokenizer, side = pipe.text_tokenizer, 8
    caches = [
        pipe.trunk.encode_text(tokenizer([p], return_tensors="pt").input_ids) for p in ("two red cats on grass", "")
    ]
    x = torch.randn((16, side, side), generator=seeded(7)[0])[None]
    sigmas = [*np.linspace(1, 1 / 1000, STEPS), 0.0]
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas):
            level = torch.tensor([now], dtype=torch.float32)
            wanted, free = (pipe.velocity_decoder(x, level, pipe.trunk(x, level, cache)) for cache in caches)
            x = x + (after - now) * (free + 2.5 * (wanted - free))
    assert torch.allclose(draw(pipe, guidance_scale=2.5, output_type="latent"), x, atol=2e-4)


def test_guidance(pipe: TextToImagePipeline) -> None:
    off = draw(pipe, guidance_scale=1.0)
    assert not pipe.do_classifier_free_guidance
    assert not torch.allclose(off, draw(pipe, guidance_scale=4.0), atol=1e-3)
    assert not torch.allclose(draw(pipe), draw(pipe, negative_prompt="a dog"), atol=1e-4)


def test_codes_need_their_parts() -> None:
    with pytest.raises(UserError, match="mode='flow'"):
        draw(tiny_pipeline(codes=False), mode="codes")


def test_codes_are_the_bridges_centres(pipe: TextToImagePipeline) -> None:
    latents = draw(pipe, mode="codes", output_type="latent")
    assert torch.equal(pipe.bridge.dequantize(pipe.bridge.quantize(latents)), latents)


def test_masked_steps_follow_the_cosine() -> None:
    assert masked_steps(64, 1) == [0]
    left = masked_steps(64, 12)
    assert left[-1] == 0
    assert left[0] == 63
    assert left[5] == 45
    for steps in (32, 63, 64, 100):
        left = [64, *masked_steps(64, steps)]
        assert left[-1] == 0
        assert all(a > b or a == 0 for a, b in itertools.pairwise(left)), "a step without a token"
    assert masked_steps(4, 12)[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(left))


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 32, 200])
def test_codes_fill_the_picture_and_then_revise_it(steps: int) -> None:
    count = steps // 3
    plan = list(code_steps(seeded(1, 2), 64, steps, revisions=count, revised=0.25))
    filling, revising = plan[: len(plan) - count], plan[len(plan) - count :]
    assert 1 <= len(filling) <= min(steps, 64)
    for row in (0, 1):
        first = torch.cat([step.now_BN[row] for step in filling])
        assert sorted(first.tolist()) == list(range(64))  # each token once
        for masked, now, known, *_ in plan:
            assert masked[row, now[row]].all()  # only what is masked is drawn
            assert masked[row].sum() == 64 - round(64 * known)
        for masked, now, *_ in revising:
            assert len(now[row]) == 16 == masked[row].sum()
    assert {step.heat for step in filling} == {1.0}
    heats = [1.0, *(step.heat for step in revising)]
    assert all(a > b for a, b in itertools.pairwise(heats))
    assert heats[-1] == pytest.approx(COOLED if revising else 1.0)
    alone = list(code_steps(seeded(2), 64, steps, revisions=count, revised=0.25))
    assert all(torch.equal(a[1][0], b[1][1]) for a, b in zip(alone, plan, strict=True))


@pytest.mark.parametrize("kind", [FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler])
def test_other_schedulers(kind: type) -> None:
    pipe = tiny_pipeline()
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if kind is UniPCMultistepScheduler else {}
    pipe.scheduler = kind(**options)
    picture = draw(pipe, num_inference_steps=4)
    assert picture.isfinite().all()
    assert torch.allclose(picture, draw(pipe, num_inference_steps=4))


@pytest.mark.parametrize("kind", [DDIMScheduler, UniPCMultistepScheduler])
def test_schedulers_of_noise_are_refused(kind: type) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = kind()
    with pytest.raises(UserError, match=r"prediction_type='epsilon'.*velocity.*FlowMatchEulerDiscreteScheduler"):
        draw(pipe, num_inference_steps=2)


def test_callbacks_change_and_stop(pipe: TextToImagePipeline) -> None:
    seen: list[int] = []

    def watch(
        p: TextToImagePipeline, step: int, timestep: Any, kwargs: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        seen.append(step)
        p._interrupt = step == 1
        return {"latents": torch.zeros_like(kwargs["latents"])}

    latents = draw(pipe, callback_on_step_end=watch, output_type="latent", num_inference_steps=5)
    assert seen == [0, 1]
    assert not latents.any()
    assert pipe.num_timesteps == 5
    assert draw(pipe).isfinite().all()  # the next call is not interrupted


def test_stopped_codes_leave_the_rest_grey(pipe: TextToImagePipeline) -> None:
    def stop(p: TextToImagePipeline, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        p._interrupt = True
        return {}

    latents = draw(pipe, mode="codes", num_inference_steps=4, output_type="latent", callback_on_step_end=stop)
    undrawn = (latents == 0).all(1).sum()  # latents of zero decode to the mean picture
    assert undrawn == masked_steps(64, 4 - FULL_CODES.revisions(4))[0]


def test_given_latents_and_prompt_lists(pipe: TextToImagePipeline) -> None:
    noise = torch.randn((16, 8, 8), generator=seeded(7)[0])[None]
    assert torch.equal(draw(pipe, latents=noise), draw(pipe))
    assert draw(pipe, ["a cat", "a dog"], num_images_per_prompt=2).shape[0] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": []}, "no prompt"),
        ({"height": 256}, "128 x 256"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": -1.0}, r"guidance_scale is -1\.0"),
        ({"mode": "codes", "latents": torch.zeros(1, 16, 8, 8)}, "leave them out"),
        ({"mode": "magic"}, "magic"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"output_type": "jpeg"}, "jpeg"),
        ({"generator": seeded(1, 2)}, "2 generators for 1"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"\(1, 4, 8, 8\)"),
        ({"attention_kwargs": {"scales": 2}}, "scales"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"prompt": 7}, "a prompt is a text or a list of texts, got int 7"),
        ({"prompt": ["a cat", None]}, "a prompt is a text, got NoneType"),
        ({"negative_prompt": 7}, "a negative prompt is a text or a list of texts, got int 7"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"guidance_scale": True}, "guidance_scale is True"),
        ({"temperature": "hot", "mode": "codes"}, "temperature is 'hot'"),
        ({"temperature": float("nan"), "mode": "codes"}, "temperature is"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps is 2\.5; give a whole number"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt is '2'; give a whole number"),
        ({"best_of": 1.5}, r"best_of is 1\.5; give a whole number from 1 to 64"),
        ({"sigmas": 1.0}, r"sigmas are 1\.0; give a list"),
        ({"generator": 7}, r"generator is 7; give torch\.Generator"),
        ({"generator": [7]}, r"generator is 7; give torch\.Generator"),
        ({"latents": [0.0]}, "latents are a list; give a tensor"),
    ],
)
def test_wrong_input_says_what_was_wrong(pipe: TextToImagePipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(pipe, **options)


def test_unknown_words_warn_once_with_the_nearest(pipe: TextToImagePipeline) -> None:
    with pytest.warns(UserWarning, match="'tigr'.*tiger") as caught:
        draw(pipe, ["a tigr", "two tigr"])
    (only,) = [w for w in caught if "tigr" in str(w.message)]
    assert Path(only.filename).name == "tiny.py"  # it points at the caller's line, not into a library


def test_caches_pad_and_stack(pipe: TextToImagePipeline) -> None:
    short, long = (pipe.encode_prompt(p)[0] for p in ("a cat", "a cat " * 20))
    both = PromptCache.cat([short, long])
    assert both.mask_BT.sum(1).tolist() == [4, 42]


def test_a_prompt_that_names_nothing_gives_one_warning(pipe: TextToImagePipeline) -> None:
    for prompt in ("a hat", "xyzzy", "ein roter Hund"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draw(pipe, prompt, num_inference_steps=1)
        (said,) = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
        assert said.startswith(f"{prompt!r} names nothing that the model can draw: ") and "`strict` refuses" in said
