"""Runs the crisp stage: `mm train mm-tiny --stage crisp --init-from weights/mm-tiny`.

Design choices
- Redrawn latents are written first, a shard at a time; shards that are there stay, and later ones are taken in as they
  appear.
- At every look the averaged decoder is published beside the encoder, which is as it was, and sharpness and PSNR on
  renders that no training draws go into the log, with a sheet of pictures.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mm.core.errors import UserError
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.tokenizers import Autoencoder
from mm.training.crisp_stage import BatchMaker, Crisp, CrispBatch, CrispConfig, RedrawnPool, gradient_energy, grown
from mm.training.loop import Loop, LoopConfig
from mm.training.redrawn import write_redrawn
from mm.training.tokenizer_data import held_out_scenes
from mm.training.tokenizer_stage import save_grid
from mm.world.render import render
from mm.world.vocabulary import STYLES

LOOKED_AT = 8  # held-out renders of each style


def train_crisp(
    autoencoder: Autoencoder,
    drawn_by: Path,
    state: Path,
    folder: Path,
    loop_config: LoopConfig,
    config: CrispConfig,
    *,
    shards: int,
    shard_size: int,
) -> Loop:
    """Runs (or goes on with) the stage.

    Args:
        autoencoder: What is published, or what an earlier run of this stage wrote; its encoder stays.
        drawn_by: Folder with the trunk and the velocity decoder that redraw.
        state: Folder of everything in the making; shards lie in `redrawn`, the run in `crisp`.
        folder: Where the averaged autoencoder goes.
        loop_config: Minutes, rates and batch size.
        config: Losses and the decoder's growth.
        shards: Shards of redrawn latents to have before training.
        shard_size: Scenes of each.
    """
    if config.redrawn_share:
        _write_shards(autoencoder, drawn_by, state / "redrawn", shards, shard_size)
    torch.manual_seed(0)
    whole = grown(autoencoder, config).float()
    loop = Loop(Crisp(whole.decoder, config), state / "crisp", loop_config)
    pool = RedrawnPool(state / "redrawn") if config.redrawn_share else None
    make = BatchMaker(autoencoder.float().eval(), pool, loop_config.batch_size, config)
    device = loop.accelerator.device

    def batches(step: int) -> CrispBatch:
        if pool is not None and step % 100 == 0:
            pool.refresh()
        batch = make(random.Random(f"crisp {loop_config.seed} {step} {loop.accelerator.process_index}"))
        return CrispBatch(**{name: getattr(batch, name).to(device) for name in CrispBatch.__slots__})

    def look(now: Loop) -> None:
        published: Any = copy.deepcopy(whole).to("cpu", torch.bfloat16)
        published.save_pretrained(folder / "autoencoder")
        now.log(**_looked(whole, state / "crisp"))

    loop.run(batches, look)
    return loop


def _write_shards(autoencoder: Autoencoder, drawn_by: Path, folder: Path, shards: int, size: int) -> None:
    if all((folder / f"{k:05d}.safetensors").is_file() for k in range(shards)):
        return
    parts: dict[str, Any] = {}
    for name, kind in (("trunk", Trunk), ("velocity_decoder", VelocityDecoder)):
        if not (drawn_by / name / "config.json").is_file():
            raise UserError(f"{drawn_by} holds no trained {name}; run the drawing stage first or use --init-from")
        parts[name] = kind.from_pretrained(drawn_by / name).eval()
    pipe = TextToImagePipeline(
        **parts,
        autoencoder=autoencoder,
        text_tokenizer=build_text_tokenizer(),
        scheduler=_scheduler(drawn_by / "scheduler"),
    )
    for k in range(shards):
        write_redrawn(folder, k, pipe, size=size)


def _scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The published one; the default where a model in the making has none yet."""
    known = (folder / "scheduler_config.json").is_file()
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder) if known else FlowMatchEulerDiscreteScheduler()


@torch.no_grad()
def _looked(autoencoder: Autoencoder, out: Path) -> dict[str, float]:
    """Sharpness (as a share of the renders') and PSNR in dB of reconstructions, and a sheet `preview.png`."""
    sharp, psnr, rows = [], [], []
    for style in STYLES:
        wanted = render(held_out_scenes(style, LOOKED_AT))
        written = autoencoder(wanted.to(autoencoder.device).float() / 127.5 - 1).cpu()
        written = ((written + 1) * 127.5).round().clamp(0, 255)
        sharp.append(gradient_energy(written).mean() / gradient_energy(wanted.float()).mean())
        psnr.append(10 * torch.log10(255**2 / (written - wanted).square().mean((1, 2, 3))).mean())
        rows += [torch.cat(list(wanted), 2), torch.cat(list(written.byte()), 2)]
    save_grid(torch.cat(rows, 1), out / "preview.png")
    return {"sharp": float(torch.stack(sharp).mean()), "psnr": float(torch.stack(psnr).mean())}
