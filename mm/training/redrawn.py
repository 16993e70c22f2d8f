"""Latents that the model itself writes for known scenes: what the decoder meets in use, with a target picture.

Design choices
- A scene's latents are mixed with noise up to some level of the flow and denoised from there, guided by the scene's
  full caption (SDEdit, Meng et al. 2021, arXiv 2108.01073). Up to a level of .7 the layout stays, and the details
  are the model's own: so a drawn picture has a target.
- Shards as in `mm.training.latents`, with the scenes beside the latents; shard k depends on (seed, k) alone. A shard
  appears whole, and a run takes in those that are there.

Legend: B pictures, C latent channels, H = W latents a side.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from mm.core.files import write_files
from mm.pipelines.guidance import text_branches
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.training.latents import scene_to_json
from mm.world.captions import caption
from mm.world.render import render
from mm.world.scene import Scene, sample_scene

STARTS = (5, 6, 7, 8)  # of 12 steps; those before are left out. From 4 on, some pictures come out in another layout


@torch.no_grad()
def redraw(
    pipe: TextToImagePipeline,
    latents_BCHW: torch.Tensor,
    prompts: Sequence[str],
    generator: torch.Generator,
    *,
    start: int,
    steps: int = 12,
    guidance: float = 5.5,
) -> torch.Tensor:
    """Latents (B, C, H, W), noised to the level of step `start` of `steps` and denoised from there by the flow.

    Args:
        pipe: A pipeline with trunk and velocity decoder.
        latents_BCHW: Encoded pictures, of unit deviation.
        prompts: What each picture shows.
        generator: Of the noise.
        start: Steps that are left out; 0 keeps nothing of the latents, `steps` all.
        steps: Steps of the whole flow.
        guidance: Weight of classifier-free guidance.
    """
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    if start >= steps:
        return latents_BCHW
    level = float(scheduler.timesteps[start] / scheduler.config.num_train_timesteps)
    noise_BCHW = torch.randn(latents_BCHW.shape, generator=generator)
    x_BCHW = (1 - level) * latents_BCHW + level * noise_BCHW
    branches = text_branches(*pipe.encode_prompt(list(prompts)), guidance)
    for timestep in scheduler.timesteps[start:]:
        several = x_BCHW.repeat(len(branches), 1, 1, 1)
        sigma = (timestep / scheduler.config.num_train_timesteps).float().expand(len(several))
        features = pipe.trunk(several.to(pipe.trunk.dtype), sigma, branches.cache, "flow")
        velocity = pipe.velocity_decoder(several.to(pipe.velocity_decoder.dtype), sigma, features).float()
        x_BCHW = scheduler.step(branches.mix(velocity, guidance), timestep, x_BCHW, return_dict=False)[0]
    return x_BCHW


@torch.no_grad()
def write_redrawn(folder: Path, k: int, pipe: TextToImagePipeline, *, seed: int = 0, size: int = 512) -> None:
    """Writes shard `k` into `folder`; does nothing when it is there. Every batch leaves out its own number of steps."""
    path = folder / f"{k:05d}.safetensors"
    if path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"redrawn {seed} {k}")
    scenes: list[Scene] = []
    encoded, redrawn = [], []
    while len(scenes) < size:
        now = [sample_scene(rng, default_weight=8) for _ in range(min(16, size - len(scenes)))]
        latents = pipe.autoencoder.encode(render(now).float() / 127.5 - 1).float()
        words = [caption(scene, rng, detail="full") for scene in now]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        encoded.append(latents)
        redrawn.append(redraw(pipe, latents, words, generator, start=rng.choice(STARTS)))
        scenes += now
    tensors = {"encoded": torch.cat(encoded).half(), "redrawn": torch.cat(redrawn).half()}
    lines = "\n".join(map(scene_to_json, scenes)) + "\n"
    write_files({path.with_suffix(".jsonl"): lines.encode(), path: save(tensors)})
