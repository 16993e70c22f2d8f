"""The autoencoder stage: `python -m mm.training.tokenizer_stage --out DIR --minutes 32 --seed 0`.

Design choices
- Latents are normalized by batch statistics in training (a batch norm without weights) and get a little noise before
  decoding.
- Published are the averaged weights, with the latents' mean and deviation measured on them.
- With `freeze_encoder` the decoder alone is trained, and latents stay as they are.

Legend: B batch, C channels, H height, W width, N pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.core.checks import texts
from mm.core.picture_metrics import psnr
from mm.evaluation.reconstruct import save_grid
from mm.tokenizers.autoencoder import Autoencoder
from mm.training.optimizers import Muon
from mm.training.stage import Stage, StageContext
from mm.training.tokenizer_data import (
    ScenePool,
    SemanticHead,
    TokenizerBatch,
    held_out_scenes,
    reconstruction_loss,
    to_float,
)
from mm.training.trainer import TrainerConfig
from mm.world.render import render
from mm.world.vocabulary import STYLES

KINDS = ("autoencoder", "fsq", "vq")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Data and losses of the stage.

    Attributes:
        kind: "autoencoder", or a tokenizer that is quantized in training: "fsq" or "vq".
        latent_noise: Largest deviation of the noise before decoding, of the autoencoder.
        edge_weight: Of the error of image gradients.
        semantic_weight: Of the semantic head's loss.
        pool_start: Rendered scenes before the first step.
        pool_grow: Rendered scenes more a step.
        pool_size: The most rendered scenes.
        freeze_encoder: Whether the decoder alone is trained.
        favour: Styles that half of the scenes are in.
    """

    kind: str = "autoencoder"
    latent_noise: float = 0.12
    edge_weight: float = 0.5
    semantic_weight: float = 0.01
    pool_start: int = 4096
    pool_grow: int = 3
    pool_size: int = 32768
    freeze_encoder: bool = False
    favour: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; give {', '.join(KINDS)}")
        object.__setattr__(self, "favour", texts("favour", self.favour))
        if unknown := sorted(set(self.favour) - set(STYLES)):
            raise ValueError(f"no style {', '.join(unknown)} to favour; there are {', '.join(STYLES)}")


class TokenizerTraining(nn.Module):
    """A tokenizer and its semantic head, with their losses."""

    def __init__(self, model: Any, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = model.to(memory_format=torch.channels_last)
        if config.freeze_encoder:
            self.model.encoder.requires_grad_(False)
        self.head = SemanticHead(model.config.latent_channels)

    def forward(self, batch: TokenizerBatch) -> dict[str, Tensor]:
        """Losses `reconstruction`, `auxiliary` (of a quantizer) and `semantic`."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch.noise_seed)  # a resumed run has the same noise, and a quantizer the same samples
            latents, auxiliary = self._latents(batch.pictures)
            level = torch.rand(len(latents), 1, 1, 1, device=latents.device)
            level = level * (config.latent_noise if config.kind == "autoencoder" else 0)
            output = self.model.decoder(latents + level * torch.randn_like(latents))
            semantic = self.head.loss(latents, batch)
        return {
            "reconstruction": reconstruction_loss(output, batch.pictures, config.edge_weight),
            "auxiliary": auxiliary.float(),
            "semantic": config.semantic_weight * semantic,
        }

    def _latents(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder reads, and an auxiliary loss."""
        if self.config.freeze_encoder:  # normalized by the config's statistics
            latents_BCHW = self.model.encode(pictures_BCHW).float()
            return latents_BCHW, latents_BCHW.new_zeros(())
        latents_BCHW, auxiliary = self.model.training_latents(pictures_BCHW)
        return latents_BCHW.float(), auxiliary

    def optimizers(self, config: TrainerConfig) -> list[torch.optim.Optimizer]:
        """AdamW for the first and last convolutions, biases and the head; Muon for the other kernels."""
        ends = {id(p) for part in (self.model.encoder, self.model.decoder) for p in _ends(part)}
        named = [p for p in self.model.parameters() if p.requires_grad and p.ndim == 4 and id(p) not in ends]
        hidden = named if config.muon else []
        taken = {id(p) for p in hidden}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        settings: dict[str, Any] = {"weight_decay": config.weight_decay}
        out: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, config.learning_rate, betas=(0.9, 0.98), fused=True, **settings)
        ]
        return [*out, Muon(hidden, config.muon_rate, **settings)] if hidden else out


def _ends(part: nn.Module) -> Iterator[Tensor]:
    """Kernels of the first and the last convolution, which touch pictures or latents and suit Adam better."""
    kernels = [module.weight for module in part.modules() if isinstance(module, nn.Conv2d)]
    yield kernels[0]
    yield kernels[-1]


class PoolBatches:
    """Batches of a growing pool of renders."""

    def __init__(self, config: TokenizerConfig, batch_size: int, seed: int) -> None:
        if config.pool_start < batch_size:
            raise ValueError(f"pool_start is {config.pool_start}, below the batch size of {batch_size}")
        self.config, self.batch_size = config, batch_size
        self.pool = ScenePool(seed, config.pool_size, config.favour)

    def __call__(self, step: int, process: int = 0) -> TokenizerBatch:
        self.pool.grow_to(self.config.pool_start + self.config.pool_grow * step)
        return self.pool.pick(self.batch_size, 1_000_000_007 * process + step)


def build(kind: str) -> Any:
    """A fresh tokenizer of a kind."""
    if kind == "autoencoder":
        return Autoencoder()
    from mm.tokenizers.quantized import QuantizedTokenizer

    return QuantizedTokenizer(kind=kind)


def started_from(folder: Path, kind: str) -> Any:
    """A tokenizer of `kind` with a saved one's weights.

    A quantized one may start from an autoencoder's convolutions: the quantizer is fresh, and a short run end to end
    then compares fairly.
    """
    source = Autoencoder if json.loads((folder / "config.json").read_text())["_class_name"] == "Autoencoder" else None
    if source is None or kind == "autoencoder":
        return type(build(kind)).from_pretrained(folder)
    model, saved = build(kind), source.from_pretrained(folder)
    for part in ("encoder", "decoder"):
        model.get_submodule(part).load_state_dict(saved.get_submodule(part).state_dict())
    return model


@torch.no_grad()
def measured(module: TokenizerTraining, pool: ScenePool, count: int = 1024) -> Any:
    """A copy of the tokenizer with its latents' mean and deviation measured on renders."""
    model = copy.deepcopy(module.model).eval()
    if module.config.freeze_encoder:
        return model
    raw = []
    for start in range(0, min(count, pool.count), 64):
        pictures = to_float(pool.pictures[start : start + 64]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            raw.append(model.raw_latents(pictures).float())
    raw_NCHW = torch.cat(raw)
    mean, std = raw_NCHW.mean((0, 2, 3)), raw_NCHW.std((0, 2, 3))
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return model


@torch.no_grad()
def reconstructed(model: nn.Module, pictures_u8: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB of each picture after encode and decode (rounded to bytes), and the reconstructions as uint8."""
    device = next(model.parameters()).device
    outputs = []
    for chunk in pictures_u8.split(64):
        with torch.autocast(device.type, torch.bfloat16):
            decoded = model(to_float(chunk).to(device)).float().cpu()
        outputs.append(((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    output = torch.cat(outputs)
    return psnr(output.float(), pictures_u8.float(), data_range=255.0), output


def report(model: nn.Module, held_out: dict[str, Tensor], folder: Path) -> dict[str, float]:
    """Mean PSNR per style, and a grid `preview.png` of originals above their reconstructions."""
    scores: dict[str, float] = {}
    rows: dict[str, list[Tensor]] = {}
    for style, pictures in held_out.items():
        values, output = reconstructed(model, pictures)
        scores[style] = round(values.mean().item(), 2)
        rows[style] = [pictures[:8], output[:8]]
    scores["mean"] = round(sum(scores.values()) / len(scores), 2)
    save_grid(rows, folder / "preview.png")
    return scores


def make_stage(model: Any, settings: TokenizerConfig, config: TrainerConfig, folder: Path, name: str) -> Stage:
    """The stage for a tokenizer, which is published into `folder`."""
    torch.manual_seed(config.seed)
    module = TokenizerTraining(build(settings.kind) if model is None else model, settings)
    batches = PoolBatches(settings, config.batch_size, config.seed)
    held_out = {style: render(held_out_scenes(style, 64)) for style in STYLES}

    def evaluate(trainer: Any) -> dict[str, Any]:
        published = measured(trainer.bare, batches.pool)
        published.save_pretrained(folder)
        return {"psnr": report(published, held_out, trainer.out)}

    return Stage(
        name=name,
        module=module,
        batches=batches,
        evaluate=evaluate,
        config=config,
        optimizers=lambda _: module.optimizers(config),
    )


def stage(context: StageContext) -> Stage:
    """The autoencoder stage."""
    settings, config = context.settings(TokenizerConfig, "autoencoder"), context.trainer_config("autoencoder")
    return make_stage(None, settings, config, context.state / "model" / "autoencoder", "autoencoder")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Train the autoencoder (or an FSQ or VQ tokenizer) on rendered scenes."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of state, previews and the model; resumes there"
    )
    parser.add_argument("--minutes", type=float, default=32.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, default="autoencoder")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--edge-weight", type=float, default=0.5)
    parser.add_argument("--semantic-weight", type=float, default=0.01)
    parser.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone (starts from --init)")
    parser.add_argument("--favour", nargs="+", default=(), metavar="STYLE", help="half of the scenes in these styles")
    parser.add_argument("--init", type=Path, help="folder of a saved tokenizer to start from")
    args = parser.parse_args()
    settings = TokenizerConfig(
        kind=args.kind,
        edge_weight=args.edge_weight,
        semantic_weight=args.semantic_weight,
        freeze_encoder=args.freeze_encoder,
        favour=tuple(args.favour),
    )
    config = TrainerConfig(
        minutes=args.minutes, batch_size=args.batch_size, learning_rate=args.lr, muon_rate=args.lr,
        muon=args.optimizer == "muon", warmup=150, schedule="cosine", seed=args.seed, save_minutes=2, preview_minutes=2,
    )  # fmt: skip
    model = started_from(args.init, args.kind) if args.init else None
    make_stage(model, settings, config, args.out / "model", args.out.name).train(args.out.parent)


if __name__ == "__main__":
    main()
