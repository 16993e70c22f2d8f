"""Each family's objective: its prediction is what the pipeline's own sampling computes."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from latent_grids import grid_of
from tiny_pipelines import SIDE, arguments_of, tiny_pipeline_of

from mm.customization.objectives.processes import FlowObjective
from mm.customization.objectives.protocol import objective_of
from mm.customization.objectives.sana_sprint import SanaSprint
from mm.customization.rows import Rows
from mm.families.frames import pictures_of

NAMES = (
    "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "flux-schnell", "qwen-image", "sana",
    "z-image", "flux-2", "flux-2-klein", "chroma", "lumina-2", "pixart-sigma", "aura-flow",
    "cogview-4", "wan", "hunyuan-image", "bria",
    "hunyuan-dit", "flux-fill", "sana-sprint",
)  # fmt: skip
TOLERANCE = 1e-4  # of the largest value


@pytest.mark.parametrize("name", NAMES)
def test_the_prediction_is_that_of_sampling(name: str) -> None:
    """Each step of the pipeline's own loop, without guidance, is compared with `predict`."""
    pipe = tiny_pipeline_of(name)
    seen: list[dict[str, Any]] = []
    before = pipe.scheduler.step

    def step(output: torch.Tensor, timestep: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sigma = pipe.scheduler.sigmas[len(seen)] if hasattr(pipe.scheduler, "sigmas") else None
        seen.append({"output": output.clone(), "timestep": timestep, "latents": latents.clone(), "sigma": sigma})
        return before(output, timestep, latents, *args, **kwargs)

    pipe.scheduler.step = step
    more: dict[str, Any] = {"guidance_scale": 0.0 if name == "z-image" else 1.0, "num_inference_steps": 3}
    if name == "qwen-image":
        more = {"true_cfg_scale": 1.0}
    if name == "sana-sprint":
        more = {}
    if name.startswith("sana"):
        takes = inspect.signature(type(pipe).__call__).parameters
        more["complex_human_instruction"] = takes["complex_human_instruction"].default
    if name == "flux-fill":  # its call draws from the latents' distribution, which is narrow so
        pipe.vae.encoder.conv_out.bias.data[16:] = -40
    if name == "hunyuan-image":
        more, pipe.guider = {}, None
    pipe(**arguments_of(name, **more))
    for one in seen:
        _same_prediction(name, pipe, **one)


def _same_prediction(
    name: str, pipe: Any, output: torch.Tensor, timestep: Any, latents: torch.Tensor, sigma: torch.Tensor | None
) -> None:
    objective = objective_of(pipe, SIDE)
    level = torch.as_tensor(timestep).float().reshape(1)
    if isinstance(objective, SanaSprint):
        level, latents, output = _as_flow(float(level), latents, output)
    elif isinstance(objective, FlowObjective):
        level = torch.as_tensor(sigma).float().reshape(1)
    elif isinstance(pipe.scheduler, EulerDiscreteScheduler):
        latents = latents / (torch.as_tensor(sigma) ** 2 + 1) ** 0.5
    latents, output = grid_of(name, latents), grid_of(name, output)
    with torch.no_grad():
        made, other = (
            objective.predict(latents.float(), level, objective.encode_prompts([prompt]))
            for prompt in ("a red fox", "a red foxx")
        )
    assert made.shape == latents.shape
    scale = output.float().reshape(made.shape).abs().max()
    assert float((made - output.float().reshape(made.shape)).abs().max()) < TOLERANCE * float(scale)
    assert float((made - other).abs().max()) > TOLERANCE * float(scale)  # so that a wrong prompt is seen


def _as_flow(t: float, latents: torch.Tensor, output: torch.Tensor) -> Any:
    """The level, the noisy latents and the velocity of flow matching that TrigFlow's at t stand for."""
    sine, cosine, deviation = math.sin(t), math.cos(t), 0.5
    clean = (cosine * latents - sine * output) / deviation
    noise = (sine * latents + cosine * output) / deviation
    level = sine / (sine + cosine)
    return torch.tensor([level]), (1 - level) * clean + level * noise, noise - clean


def test_sana_sprint_is_noised_as_its_scheduler_noises() -> None:
    """From the clean latents and the noise of the first step to the noisy latents of the second one."""
    pipe, seen = tiny_pipeline_of("sana-sprint"), []
    step = pipe.scheduler.step

    def spied(output: torch.Tensor, t: torch.Tensor, latents: torch.Tensor, *args: Any, **more: Any) -> Any:
        made = step(output, t, latents, *args, **more)
        seen.append((float(t), *made))
        return made

    pipe.scheduler.step = spied
    pipe(**arguments_of("sana-sprint"))
    objective = objective_of(pipe, SIDE)
    (_, noisy, clean), (t, _, _) = seen
    noise = (noisy - math.cos(t) * clean) / math.sin(t)
    level, deviation = objective.level_of(t), pipe.scheduler.config.sigma_data
    made = objective.noised_in_call(clean / deviation, noise / deviation, level)
    assert torch.allclose(made, noisy, atol=1e-5) and float(level) == pytest.approx(0.7827, abs=1e-4)
    assert abs(float(noise.std()) / deviation - 1) < 0.1
    generator = torch.Generator().manual_seed(0)
    levels = objective.levels(1000, generator)
    assert float(levels.median()) == pytest.approx(1 / (1 + math.exp(-0.2) * deviation), abs=0.02)


@pytest.mark.parametrize("name", ["flux", "pixart-sigma", "wan"])
def test_gradients_reach_a_word_in_every_text_encoder(name: str) -> None:
    """T5 reads words with another module than the one that it calls its embedding."""
    pipe = tiny_pipeline_of(name)
    objective = objective_of(pipe, SIDE)
    rows = Rows(objective, {"<sks>": ""}, seed=0)
    read = objective.encode_prompts(["a <sks>"])
    torch.stack([one.float().square().sum() for one in read.values() if one.requires_grad]).sum().backward()
    assert len(rows.values) == len(objective.tables)
    assert all(value.grad is not None and value.grad.any() for value in rows.parameters().values())
    rows.remove()
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_wan_with_a_timestep_for_each_token_predicts_what_sampling_does() -> None:
    """As Wan 2.2 TI2V-5B does; here all tokens have the same, so that the plain prediction is that of sampling."""
    pipe = tiny_pipeline_of("wan")
    shapes: list[torch.Size] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["timestep"].shape), with_kwargs=True
    )
    made = []
    for each in (False, True):
        pipe.register_to_config(expand_timesteps=each)
        pipe(**arguments_of("wan", guidance_scale=1.0, num_inference_steps=1))
        objective = objective_of(pipe, SIDE)
        noisy = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            made.append(objective.predict(noisy, torch.tensor([0.5]), objective.encode_prompts(["a red fox"])))
    assert shapes == [(1,), (1,), (1, 64), (1, 64)]
    assert torch.allclose(made[0], made[1], atol=1e-4)


def test_distilled_hunyuan_image_is_trained_at_no_guidance_and_at_steps_of_no_length() -> None:
    """As its call gives both: the scale in thousandths, and the timestep at which a step ends."""
    pipe, seen = tiny_pipeline_of("hunyuan-image"), []
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    config |= {"guidance_embeds": True, "use_meanflow": True}
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    pipe.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    pipe.guider = pipe.ocr_guider = None
    pipe(**arguments_of("hunyuan-image", distilled_guidance_scale=1.0))
    objective = objective_of(pipe, SIDE)
    noisy = torch.randn(1, 16, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        objective.predict(noisy, torch.tensor([0.25]), objective.encode_prompts(["a red fox"]))
    *drawn, learned = seen
    assert [float(each["guidance"]) for each in seen] == [1000.0] * 3
    assert float(drawn[0]["timestep_r"]) == float(drawn[1]["timestep"]) < float(drawn[0]["timestep"]) == 1000
    assert float(learned["timestep"]) == float(learned["timestep_r"]) == 250


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_decoded_as_the_pipeline_does(name: str) -> None:
    """The last latents of the pipeline's own loop give its picture."""
    pipe = tiny_pipeline_of(name)
    last: list[torch.Tensor] = []
    before = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        made = before(*args, **kwargs)
        last[:] = [made[0].clone()]
        return made

    pipe.scheduler.step = step
    more: dict[str, Any] = {"output_type": "pt"}
    if name.startswith("sana"):
        takes = inspect.signature(type(pipe).__call__).parameters
        more["complex_human_instruction"] = takes["complex_human_instruction"].default
    pictures = torch.stack(list(pictures_of(pipe(**arguments_of(name, **more)))))
    if name == "sana-sprint":
        last[0] /= pipe.scheduler.config.sigma_data
    with torch.no_grad():
        made = objective_of(pipe, SIDE).decode_latents(grid_of(name, last[0])) / 2 + 0.5
    assert made.shape == pictures.shape
    assert float((made.clamp(0, 1) - pictures).abs().max()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_scaled_to_latents_as_latents_are_to_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder decodes what it encoded: with the test above, so latents have the scale of sampling."""
    pipe = tiny_pipeline_of(name)
    objective, vae = objective_of(pipe, SIDE), pipe.vae
    encode, decode = vae.encode, vae.decode
    made: list[torch.Tensor] = []

    def encoded(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        made.append(out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent)
        return out

    def decoded(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made.append(latents)
        return decode(latents, *args, **kwargs)

    monkeypatch.setattr(vae, "encode", encoded)
    monkeypatch.setattr(vae, "decode", decoded)
    with torch.no_grad():
        objective.decode_latents(objective.encode_pictures(torch.rand(2, 3, SIDE, SIDE) * 2 - 1))
    assert torch.allclose(*made, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_other_lengths_beside_it_change_no_prediction(name: str) -> None:
    """Prompts that are remembered are put together to batches of any mix."""
    pipe = tiny_pipeline_of(name)
    objective = objective_of(pipe, SIDE)
    prompts = ["a red fox", "a blue dog at night on a hill beside a lake, and a cat", "a red fox"]
    with torch.no_grad(), objective.remembering():
        clean = objective.encode_pictures(torch.rand(3, 3, SIDE, SIDE) * 2 - 1).float()
        noise, levels = torch.randn(clean.shape), objective.fixed_levels(3)
        noisy = objective.noised(clean, noise, levels)
        made = objective.predict(noisy, levels, objective.conditions(prompts))
        for k, prompt in enumerate(prompts):
            row = slice(k, k + 1)
            alone = objective.predict(noisy[row], levels[row], objective.encode_prompts([prompt]))
            assert float((made[row] - alone).abs().max()) < TOLERANCE * float(alone.abs().max())
