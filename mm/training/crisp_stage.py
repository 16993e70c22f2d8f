"""The crisp stage: `mm train mm-tiny --stage crisp --init-from weights/mm-tiny`.

Design choices
- Redrawn latents are written first, a shard at a time; shards that are there stay, and later ones are taken in as they
  appear.
- The encoder is published as it was, so that all other parts of a model stay valid.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mm.core.errors import UserError
from mm.evaluation.reconstruct import save_grid
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.tokenizers import Autoencoder
from mm.training.crisp_data import BatchMaker, CrispBatch, CrispConfig, RedrawnPool
from mm.training.crisp_growth import grown
from mm.training.crisp_losses import Crisp, gradient_energy
from mm.training.processes import in_first_process
from mm.training.publishing import publish
from mm.training.redrawn import write_redrawn
from mm.training.stage import Stage, StageContext
from mm.training.tokenizer_data import held_out_scenes
from mm.world.render import render
from mm.world.vocabulary import STYLES

PREVIEWED = 8  # held-out renders of each style


def stage(context: StageContext) -> Stage:
    """The crisp stage, on redrawn latents that are written first where they are missing."""
    config, settings = context.trainer_config("crisp"), context.settings(CrispConfig, "crisp")
    autoencoder = context.load(Autoencoder, "autoencoder").float()
    folder, section = context.state / "redrawn", context.config["crisp"]
    if settings.redrawn_share:
        parts = context.init_from or context.state / "model"
        shards, size = section["shards"], section["shard_size"]
        in_first_process(lambda: write_shards(autoencoder, parts, folder, shards, size))
    torch.manual_seed(0)
    whole = grown(autoencoder, settings).float()
    pool = RedrawnPool(folder) if settings.redrawn_share else None
    make = BatchMaker(autoencoder, pool, config.batch_size, settings)

    def batches(step: int, process: int) -> CrispBatch:
        if pool is not None and step % 100 == 0:
            pool.refresh()
        return make(random.Random(f"crisp {config.seed} {step} {process}"))

    def evaluate(trainer: Any) -> dict[str, float]:
        publish(whole, context.published / "autoencoder")
        return reconstructions(whole, trainer.out)

    def optimizers(module: Any) -> list[torch.optim.Optimizer]:
        rates = ((module.decoder, settings.decoder_rate), (module.discriminator, 1.0))
        return [
            torch.optim.AdamW(
                part.parameters(),
                share * config.learning_rate,
                betas=(0.9, 0.95),
                weight_decay=config.weight_decay,
                fused=True,
            )
            for part, share in rates
        ]

    return Stage(
        name="crisp",
        module=Crisp(whole.decoder, settings),
        batches=batches,
        evaluate=evaluate,
        config=config,
        optimizers=optimizers,
    )


def write_shards(autoencoder: Autoencoder, drawn_by: Path, folder: Path, shards: int, size: int) -> None:
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
    fresh = FlowMatchEulerDiscreteScheduler
    loaded: Any = fresh.from_pretrained(folder) if known else fresh()
    return loaded


@torch.no_grad()
def reconstructions(autoencoder: Autoencoder, out: Path) -> dict[str, float]:
    """Sharpness (as a share of the renders') and PSNR in dB of reconstructions, and a sheet `preview.png`."""
    sharp, decibels, rows = [], [], {}
    for style in STYLES:
        target = render(held_out_scenes(style, PREVIEWED))
        output = autoencoder(target.to(autoencoder.device).float() / 127.5 - 1).cpu()
        output = ((output + 1) * 127.5).round().clamp(0, 255)
        sharp.append(gradient_energy(output).mean() / gradient_energy(target.float()).mean())
        decibels.append(10 * torch.log10(255**2 / (output - target).square().mean((1, 2, 3))).mean())
        rows[style] = [target, output.byte()]
    save_grid(rows, out / "preview.png")
    return {"sharp": float(torch.stack(sharp).mean()), "psnr": float(torch.stack(decibels).mean())}
