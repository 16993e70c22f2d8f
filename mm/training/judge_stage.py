"""The judge's stage: `python -m mm.training.judge_stage --out DIR --minutes 80 --seed 0`.

Design choices
- The averaged weights are published, with averaged batch norm statistics, at every preview.
- Once an autoencoder exists, reconstructions are part of the pictures (`mm.training.judge_pictures`).
- `--check` samples fresh scenes of the six tasks, each in every style, and prints how often the judge grants a true
  one.

Legend: B pictures, C channels.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm.tokenizers import Autoencoder
from mm.training.judge_check import ceilings, print_ceilings, quick_check
from mm.training.judge_losses import answer_table, losses
from mm.training.judge_pictures import JudgeBatch, Ring, sample_judge_scene
from mm.training.stage import Stage, StageContext
from mm.training.trainer import TrainerConfig
from mm.world.judge import Judge
from mm.world.render import render

_AUTOENCODER_STEPS = 200  # between two checks for an autoencoder


@dataclass(frozen=True, kw_only=True)
class JudgeStageConfig:
    """The judge's training data.

    Attributes:
        fresh: Renders added to the ring a step.
        ring: Renders in the ring.
        start: Renders before the first step.
        check: Fresh renders that are read at every preview.
    """

    fresh: int = 8
    ring: int = 12288
    start: int = 2048
    check: int = 192

    def __post_init__(self) -> None:
        if not 0 < self.fresh <= self.start <= self.ring:
            raise ValueError(
                f"judge training: want 0 < fresh <= start <= ring, got {self.fresh} {self.start} {self.ring}"
            )


class AutoencoderReconstruct:
    """Encodes and decodes pictures with noise in the latents, as a generator's latents would differ."""

    def __init__(self, folder: Path) -> None:
        self.autoencoder = Autoencoder.from_pretrained(folder).eval().requires_grad_(False)

    def _latents(self, pictures_BCHW: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.encode(pictures_BCHW.float() / 127.5 - 1)

    @torch.no_grad()
    def __call__(self, pictures_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        latents_BCHW = self._latents(pictures_BCHW)
        off = 0.25 * torch.rand(len(latents_BCHW), 1, 1, 1, generator=generator)
        latents_BCHW = latents_BCHW + off * torch.randn(latents_BCHW.shape, generator=generator)
        return ((self.autoencoder.decode(latents_BCHW).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @torch.no_grad()
    def unreadable(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Unreadable pictures in [0, 1]: decoded from mixtures of two scenes, from strong noise on a scene, and from
        noise."""
        rng = random.Random(int(torch.randint(2**40, (), generator=generator)))
        latents_BCHW = self._latents(render([sample_judge_scene(rng) for _ in range(count)]))
        noise = torch.randn(latents_BCHW.shape, generator=generator)
        third = count // 3
        mixed = torch.lerp(latents_BCHW, latents_BCHW.roll(1, 0), 0.5)[:third]
        noisy = (latents_BCHW + 1.2 * noise)[third : 2 * third]
        latents_BCHW = torch.cat([mixed, noisy, noise[2 * third :]])
        return (self.autoencoder.decode(latents_BCHW).clamp(-1, 1) + 1) / 2


class JudgeTraining(nn.Module):
    """The judge with its losses."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge
        self.register_buffer("answers", answer_table(), persistent=False)
        self.answers: torch.Tensor

    def forward(self, batch: JudgeBatch) -> dict[str, torch.Tensor]:
        """Named losses."""
        return losses(self.judge(batch.pictures_BCHW), batch, self.answers)


class JudgeBatches:
    """Batches of a ring buffer that is refilled at every step."""

    def __init__(self, config: JudgeStageConfig, batch_size: int, seed: int, autoencoder: Path | None = None) -> None:
        self.config, self.batch_size, self.seed, self.autoencoder = config, batch_size, seed, autoencoder
        self.ring: Ring | None = None
        self.generator = torch.Generator()
        self.reconstruct: AutoencoderReconstruct | None = None

    def __call__(self, step: int, process: int = 0) -> JudgeBatch:
        if step % _AUTOENCODER_STEPS == 0 or self.ring is None:
            self._find_autoencoder()
        if self.ring is None:  # a resumed run continues with new scenes
            seed = self.seed + 1000 * process
            self.ring = Ring(self.config.ring, f"{seed} {step}")
            self.ring.refill(self.config.start, self.reconstruct)
            self.generator.manual_seed(seed * 1_000_003 + step)
        self.ring.refill(self.config.fresh, self.reconstruct)
        if self.reconstruct is not None and step % 8 == 0:
            self.ring.add_decoded(self.reconstruct.unreadable(16, self.generator))
        return self.ring.draw(self.batch_size, self.generator)

    def _find_autoencoder(self) -> None:
        folder = self.autoencoder
        if folder is not None and self.reconstruct is None and (folder / "config.json").is_file():
            self.reconstruct = AutoencoderReconstruct(folder)


def adamw(module: nn.Module, config: TrainerConfig) -> list[torch.optim.Optimizer]:
    """AdamW that decays matrices and kernels, not biases and norms."""
    decay = [p for p in module.parameters() if p.ndim > 1]
    plain = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))]


def make_stage(
    judge: Judge, settings: JudgeStageConfig, config: TrainerConfig, autoencoder: Path | None, name: str
) -> Stage:
    """The stage of a judge, which is published into its own folder of the state."""

    def evaluate(trainer: Any) -> dict[str, float]:
        trainer.bare.judge.save_pretrained(trainer.out)
        return quick_check(trainer.bare.judge, settings.check)

    return Stage(
        name=name,
        module=JudgeTraining(judge),
        batches=JudgeBatches(settings, config.batch_size, config.seed, autoencoder),
        evaluate=evaluate,
        config=config,
        optimizers=lambda module: adamw(module, config),
    )


def stage(context: StageContext) -> Stage:
    """The judge's stage; reconstructions are used once the state has an autoencoder."""
    config, settings = context.trainer_config("judge"), context.settings(JudgeStageConfig, "judge")
    torch.manual_seed(config.seed)
    return make_stage(Judge(), settings, config, context.state / "model" / "autoencoder", "judge")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to train into (and to resume in), or to check")
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder", type=Path, help="folder of a trained autoencoder; may appear later")
    parser.add_argument(
        "--check", action="store_true", help="print the ceiling of the judge in --out (or the shipped one)"
    )
    parser.add_argument("--per-task", type=int, default=400)
    args = parser.parse_args()
    if args.check:
        reconstruct = AutoencoderReconstruct(args.autoencoder) if args.autoencoder else None
        judge = Judge.from_pretrained(args.out)
        print_ceilings(ceilings(judge, per_task=args.per_task, seed=args.seed, reconstruct=reconstruct))
        return
    if args.out is None:
        parser.error("--out is needed for training")
    config = TrainerConfig(**JUDGE_TRAINER, minutes=args.minutes, seed=args.seed)
    torch.manual_seed(args.seed)
    make_stage(Judge(), JudgeStageConfig(), config, args.autoencoder, args.out.name).train(args.out.parent)


JUDGE_TRAINER: dict[str, Any] = {
    "batch_size": 32, "learning_rate": 1.5e-3, "muon": False, "weight_decay": 0.05, "schedule": "cosine",
    "floor": 0.02, "clip": 5.0, "save_minutes": 2, "preview_minutes": 2,
}  # fmt: skip


if __name__ == "__main__":
    main()
