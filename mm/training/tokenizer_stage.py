"""The autoencoder stage: `python -m mm.training.tokenizer_stage --out DIR --minutes 32 --seed 0`.

Design choices
- The schedule runs on the fraction of the time given, so a run always ends annealed, on a fast machine or a slow one.
- Latents are normalized by batch statistics while training (a batch norm without weights) and get a little noise before
  decoding.
- What is saved is the average of the weights (EMA), with the latents' mean and deviation measured afresh on it.
- Checkpoints are safetensors, written under a temporary name and renamed.

The module does not know the renderer's or the judge's insides, nor how latents are used.

Legend: B batch, C channels, H height, W width, N pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm.tokenizers.autoencoder import Autoencoder
from mm.training.optimizers import Muon, flatten_state, restore_state
from mm.training.tokenizer_data import ScenePool, SemanticHead, held_out_scenes, reconstruction_loss, to_float
from mm.world.render import render
from mm.world.vocabulary import STYLES


@dataclass(frozen=True, kw_only=True)
class TokenizerStageConfig:
    """Settings of one run; all but `minutes` are fixed once a run has started."""

    out: str
    minutes: float = 32.0
    seed: int = 0
    kind: str = "autoencoder"
    batch_size: int = 16
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 150
    optimizer: str = "muon"
    ema: float = 0.998
    latent_noise: float = 0.12
    edge_weight: float = 0.5
    semantic_weight: float = 0.01
    pool_start: int = 4096
    pool_grow: int = 3
    pool_size: int = 32768
    report_seconds: float = 120.0
    freeze_encoder: bool = False
    favour: tuple[str, ...] = ()  # styles that half of the scenes are in

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}; give a time above 0")
        if self.kind not in ("autoencoder", "fsq", "vq"):
            raise ValueError(f"kind is {self.kind!r}; give autoencoder, fsq or vq")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer is {self.optimizer!r}; give muon or adamw")
        if unknown := sorted(set(self.favour) - set(STYLES)):
            raise ValueError(f"no style {', '.join(unknown)} to favour; there are {', '.join(STYLES)}")
        if self.pool_start < self.batch_size:
            raise ValueError(f"pool_start is {self.pool_start}, below the batch size of {self.batch_size}")


class Trainer:
    """State of one run: weights, their average, both optimizers, the clock."""

    def __init__(self, config: TokenizerStageConfig, model: Any | None = None) -> None:
        self.config, self.out = config, Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.model = model or build(config.kind)
        self.model.to(memory_format=torch.channels_last)
        self.head = SemanticHead(self.model.config.latent_channels)
        self.modules = nn.ModuleDict({"model": self.model, "head": self.head})
        if config.freeze_encoder:
            self.model.encoder.requires_grad_(False)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = self._optimizers()
        self.pool = ScenePool(config.seed, config.pool_size, config.favour)
        self.step, self.elapsed = 0, 0.0

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Muon for the hidden kernels of the model; Adam for the ends, the biases and the head."""
        config = self.config
        ends = {id(p) for part in ("encoder", "decoder") for p in _ends(getattr(self.model, part))}
        hidden = [
            p
            for p in self.model.parameters()
            if p.requires_grad and p.ndim == 4 and id(p) not in ends and config.optimizer == "muon"
        ]
        taken = {id(p) for p in hidden}
        rest = [p for p in self.modules.parameters() if p.requires_grad and id(p) not in taken]
        optimizers: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.AdamW(
                rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
            )
        }
        if hidden:
            optimizers["muon"] = Muon(hidden, lr=config.lr, weight_decay=config.weight_decay)
        return optimizers

    @property
    def fraction(self) -> float:
        return min(1.0, self.elapsed / (60 * self.config.minutes))

    def learning_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.config.warmup_steps)
        return self.config.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.fraction)))

    def train_step(self) -> dict[str, float]:
        config = self.config
        self.pool.grow_to(config.pool_start + config.pool_grow * self.step)
        batch = self.pool.pick(config.batch_size, self.step)
        torch.manual_seed(config.seed * 7_919 + self.step)  # the noise of a step is the same after a resume
        with torch.autocast("cpu", torch.bfloat16):
            latents, auxiliary = self._latents(batch.pictures)
            noise = torch.rand(len(latents), 1, 1, 1) * (config.latent_noise if config.kind == "autoencoder" else 0)
            output = self.model.decoder(latents + noise * torch.randn_like(latents))
            semantic = self.head.loss(latents, batch)
        reconstruction = reconstruction_loss(output, batch.pictures, config.edge_weight)
        (reconstruction + auxiliary + config.semantic_weight * semantic).backward()
        lr = self.learning_rate()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._average()
        return {"loss": reconstruction.item(), "semantic": semantic.item(), "lr": lr}

    def _latents(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder reads, and an auxiliary loss: a frozen encoder keeps the scale in its config."""
        if self.config.freeze_encoder:
            latents_BCHW = self.model.encode(pictures_BCHW).float()
            return latents_BCHW, latents_BCHW.new_zeros(())
        latents_BCHW, auxiliary = self.model.training_latents(pictures_BCHW)
        return latents_BCHW.float(), auxiliary

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        for kept, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            kept.copy_(buffer)  # a VQ codebook is an average already

    @torch.no_grad()
    def measured_average(self, count: int = 1024) -> nn.Module:
        """The averaged model with its latents' mean and deviation measured on pool scenes."""
        if self.config.freeze_encoder:
            return self.average
        raw = []
        for start in range(0, min(count, self.pool.count), 64):
            with torch.autocast("cpu", torch.bfloat16):
                raw.append(self.average.raw_latents(to_float(self.pool.pictures[start : start + 64])).float())
        raw_NCHW = torch.cat(raw)
        mean, std = raw_NCHW.mean((0, 2, 3)), raw_NCHW.std((0, 2, 3))
        self.average.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        return self.average

    def save(self) -> None:
        """Writes everything a resume needs, each file under a temporary name first."""
        self.out.mkdir(parents=True, exist_ok=True)
        tensors = {f"modules.{k}": v for k, v in self.modules.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= flatten_state(optimizer, name)
        # one file holds both tensors and clock, so that a kill between two renames cannot part them
        clock = {"step": str(self.step), "elapsed": repr(self.elapsed), "config": json.dumps(asdict(self.config))}
        temporary = self.out / "state.safetensors.part"
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=clock)
        os.replace(temporary, self.out / "state.safetensors")

    def resume(self) -> None:
        path = self.out / "state.safetensors"
        tensors = load_file(path)
        self.modules.load_state_dict(_under("modules.", tensors))
        self.average.load_state_dict(_under("average.", tensors))
        for name, optimizer in self.optimizers.items():
            restore_state(optimizer, name, tensors)
        with safe_open(path, "pt") as file:
            clock = file.metadata()
        self.step, self.elapsed = int(clock["step"]), float(clock["elapsed"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _ends(part: nn.Module) -> Iterator[Tensor]:
    """Kernels of the first and the last convolution, which touch pictures or latents and suit Adam better."""
    kernels = [module.weight for module in part.modules() if isinstance(module, nn.Conv2d)]
    yield kernels[0]
    yield kernels[-1]


def build(kind: str) -> Any:
    if kind == "autoencoder":
        return Autoencoder()
    from mm.tokenizers.quantized import QuantizedTokenizer

    return QuantizedTokenizer(kind=kind)


def started_from(folder: Path, kind: str) -> Any:
    """A tokenizer of `kind` with a saved one's weights. A quantized one may start from an autoencoder's convolutions:
    the quantizer is fresh, and a short run end to end then compares fairly."""
    source = Autoencoder if json.loads((folder / "config.json").read_text())["_class_name"] == "Autoencoder" else None
    if source is None or kind == "autoencoder":
        return type(build(kind)).from_pretrained(folder)
    model, saved = build(kind), source.from_pretrained(folder)
    for part in ("encoder", "decoder"):
        model.get_submodule(part).load_state_dict(saved.get_submodule(part).state_dict())
    return model


@torch.no_grad()
def psnr_per_picture(model: nn.Module, pictures_u8: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR of each picture after encode and decode (rounded to bytes), and the reconstructions as uint8."""
    outputs = []
    for chunk in pictures_u8.split(64):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(((model(to_float(chunk)).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    output = torch.cat(outputs)
    error = (output.float() - pictures_u8.float()).square().mean((1, 2, 3)).clamp_min(1e-2)
    return 10 * torch.log10(255**2 / error), output


def report(trainer: Trainer, held_out: dict[str, Tensor], started: float) -> dict[str, float]:
    """PSNR per style of the averaged model, and a grid of originals above their reconstructions."""
    model = trainer.measured_average()
    scores, rows = {}, []
    for style, pictures in held_out.items():
        psnr, output = psnr_per_picture(model, pictures)
        scores[style] = round(psnr.mean().item(), 2)
        rows += [torch.cat(list(pictures[:8]), 2), torch.cat(list(output[:8]), 2)]
    scores["mean"] = round(sum(scores.values()) / len(scores), 2)
    save_grid(torch.cat(rows, 1), trainer.out / "preview.png")
    print(json.dumps({"step": trainer.step, "seconds": round(time.time() - started), "psnr": scores}), flush=True)
    return scores


def save_grid(picture_3HW: Tensor, path: Path) -> None:
    from PIL import Image

    temporary = path.with_suffix(".part.png")
    Image.fromarray(picture_3HW.permute(1, 2, 0).contiguous().numpy()).save(temporary)
    os.replace(temporary, path)


def train(trainer: Trainer) -> dict[str, float]:
    """Runs to the end of the time budget, reporting and saving on the way; returns the final PSNR per style."""
    config, started = trainer.config, time.time()
    held_out = {style: render(held_out_scenes(style, 64)) for style in STYLES}
    trainer.pool.grow_to(config.pool_start + config.pool_grow * trainer.step)
    print(f"pool of {trainer.pool.count} scenes after {time.time() - started:.0f} s", flush=True)
    last_report = mark = time.time()
    seen = 0
    while trainer.fraction < 1:
        losses = trainer.train_step()
        now = time.time()
        trainer.elapsed += now - mark
        mark, seen = now, seen + config.batch_size
        if trainer.step % 100 == 0:
            line: dict[str, float] = {
                "step": trainer.step,
                "seconds": round(trainer.elapsed),
                "pictures": trainer.step * config.batch_size,
            }
            line |= {name: round(value, 5) for name, value in losses.items()}
            print(json.dumps(line | {"rate": round(seen / (now - started), 1), "pool": trainer.pool.count}), flush=True)
        if now - last_report > config.report_seconds:
            report(trainer, held_out, started)
            trainer.save()
            # reports and checkpoints come out of the budget: a run told 32 minutes takes 32 minutes
            trainer.elapsed += time.time() - now
            last_report = mark = time.time()
    trainer.save()
    return report(trainer, held_out, started)


def parse() -> tuple[argparse.Namespace, TokenizerStageConfig]:
    parser = argparse.ArgumentParser(
        description="Train the autoencoder (or an FSQ or VQ tokenizer) on rendered scenes."
    )
    parser.add_argument("--out", required=True, help="folder for checkpoints, previews and the final model")
    parser.add_argument("--minutes", type=float, default=32.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=("autoencoder", "fsq", "vq"), default="autoencoder")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--edge-weight", type=float, default=0.5)
    parser.add_argument("--semantic-weight", type=float, default=0.01)
    parser.add_argument("--resume", action="store_true", help="go on from state.safetensors in the folder")
    parser.add_argument("--freeze-encoder", action="store_true", help="tune the decoder alone (starts from --init)")
    parser.add_argument("--favour", nargs="+", default=(), metavar="STYLE", help="half of the scenes in these styles")
    parser.add_argument("--init", help="folder of a saved tokenizer to start from")
    args = parser.parse_args()
    args.favour = tuple(args.favour)
    named = {k: v for k, v in vars(args).items() if k not in ("resume", "init")}
    return args, TokenizerStageConfig(**named)


def main() -> None:
    args, config = parse()
    model = started_from(Path(args.init), config.kind) if args.init else None
    trainer = Trainer(config, model)
    if args.resume:
        trainer.resume()
    scores = train(trainer)
    trainer.average.save_pretrained(trainer.out / "model")
    print(json.dumps({"done": str(trainer.out / "model"), "psnr": scores}), flush=True)


if __name__ == "__main__":
    main()
