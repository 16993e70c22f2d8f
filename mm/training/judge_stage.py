"""Trains the judge, and measures its ceiling: `python -m mm.training.judge_stage --out DIR --minutes 80 --seed 0`.

Design choices
- One run, planned by the clock: the learning rate falls along a cosine over the minutes given, so that a run on any
  machine ends annealed. An exponential average of the weights is what is stored and read with.
- Every two minutes the average goes to DIR (usable at once), the whole state to DIR/state.safetensors; starting the
  same command again goes on from there.
- When the folder named by --autoencoder appears, reconstructions join the pictures (`judge_pictures`).
- `--check` draws fresh scenes of the six tasks, each in every style, and prints how often the judge grants a true one.

The module does not know generators or prompts.
Legend: B pictures, S sprite slots, G = 16 grid cells a side, K = 9 colours (natural first), O objects.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save

from mm.core.files import write_bytes
from mm.training.judge_pictures import Batch, Ring, sample_judge_scene
from mm.world import vocabulary as v
from mm.world.judge import GRID, SIZE_UNIT, STRIDE, TINTS, Judge, Raw, Reading, bump
from mm.world.render import render
from mm.world.scene import Scene
from mm.world.tasks import TASKS, sample_task, satisfies

_CHECKPOINT_SECONDS = 120.0
_LOOK_FOR_AUTOENCODER = 200  # steps
_NEAR = 0.25  # cells of at least this height learn what the object is


@dataclass(frozen=True, kw_only=True)
class JudgeStageConfig:
    """How the judge is trained."""

    out: Path
    minutes: float
    seed: int = 0
    batch: int = 32
    fresh: int = 8  # renders added to the ring a step
    ring: int = 12288
    start: int = 2048  # renders before the first step
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 100  # steps
    average: float = 0.998
    look: int = 192  # fresh renders read at every checkpoint
    autoencoder: Path | None = None

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"judge training: minutes must be positive, got {self.minutes}")
        if not 0 < self.fresh <= self.start <= self.ring:
            raise ValueError(
                f"judge training: want 0 < fresh <= start <= ring, got {self.fresh} {self.start} {self.ring}"
            )


def answer_table() -> torch.Tensor:
    """(O, tints, K): whether an object in a tint answers to each colour."""
    return torch.tensor([[[v.counts_as(o, t, c) for c in TINTS] for t in TINTS] for o in v.ALL_OBJECTS]).float()


def losses(raw: Raw, batch: Batch, answers_OTK: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every part of the loss, each already weighted; only readability learns from unreadable pictures."""
    good = batch.readable_B
    sprites_BS5, style_B = batch.sprites_BS5[good], batch.style_B[good]
    at = torch.arange(GRID) + 0.5
    present_BS = sprites_BS5[..., 0] >= 0
    dx_BSG = sprites_BS5[..., 2, None] / STRIDE - at
    dy_BSG = sprites_BS5[..., 3, None] / STRIDE - at
    distance2_BSGG = dx_BSG.square()[:, :, None, :] + dy_BSG.square()[:, :, :, None]
    distance2_BSGG = distance2_BSGG.masked_fill(~present_BS[..., None, None], 1e4)
    nearest2_BGG, nearest_BGG = distance2_BSGG.min(1)
    height_BGG = bump(nearest2_BGG)
    n_sprites = present_BS.sum().clamp_min(1)

    logit_BGG = raw.centre_BGG[good]
    miss_BGG = F.binary_cross_entropy_with_logits(logit_BGG, height_BGG, reduction="none")
    # Generalized focal loss (arXiv 2006.04388): cells that are nearly right stop pulling.
    centre = (miss_BGG * (logit_BGG.sigmoid() - height_BGG).square()).sum() / n_sprites

    b, row, column = torch.nonzero(height_BGG > _NEAR, as_tuple=True)
    weight_N = height_BGG[b, row, column]
    weight_N = weight_N / weight_N.sum().clamp_min(1)
    which = nearest_BGG[b, row, column]
    sprite_N5 = sprites_BS5[b, which]
    object_N, tint_N = sprite_N5[:, 0].long(), sprite_N5[:, 1].long()
    object_loss = F.cross_entropy(raw.object_BOGG[good][b, :, row, column], object_N, reduction="none")
    answers_NK = answers_OTK[object_N, tint_N]
    colour_logits_NK = raw.colour_BKGG[good][b, :, row, column]
    hue_N = torch.tensor([v.shows_colour(s) for s in v.STYLES])[style_B[b]]
    colour_loss = F.binary_cross_entropy_with_logits(colour_logits_NK, answers_NK, reduction="none").sum(1) * hue_N
    true_offset_N2 = torch.stack([dx_BSG[b, which, column], dy_BSG[b, which, row]], 1)
    place_loss = F.smooth_l1_loss(raw.offset_B2GG[good][b, :, row, column], true_offset_N2, reduction="none").sum(1)
    size_loss = F.smooth_l1_loss(raw.size_BGG[good][b, row, column], sprite_N5[:, 4] / SIZE_UNIT, reduction="none")

    ground_B = torch.tensor([v.shows_background(s) for s in v.STYLES])[style_B]
    background_B = F.cross_entropy(raw.background_BN[good], batch.background_B[good], reduction="none") * ground_B
    return {
        "centre": 2 * centre,
        "object": (object_loss * weight_N).sum(),
        "colour": 0.5 * (colour_loss * weight_N).sum(),
        "place": 2 * (place_loss * weight_N).sum(),
        "size": 10 * (size_loss * weight_N).sum(),
        "background": 0.3 * background_B.sum() / ground_B.sum().clamp_min(1),
        "style": 0.3 * F.cross_entropy(raw.style_BN[good], style_B),
        "readable": F.binary_cross_entropy_with_logits(raw.readable_B, good.float()),
    }


class JudgeTrainer:
    """The run: network, average, optimizer, ring and clock."""

    def __init__(self, config: JudgeStageConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.judge = Judge()
        self.averaged = Judge().eval().requires_grad_(False)
        self.averaged.load_state_dict(self.judge.state_dict())
        decay = [p for p in self.judge.parameters() if p.ndim > 1]
        plain = [p for p in self.judge.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
        self.answers = answer_table()
        self.step, self.elapsed = 0, 0.0
        self.reconstruct: AutoencoderReconstruct | None = None
        self.state_file = config.out / "state.safetensors"
        if self.state_file.is_file():
            self._resume()
        self.ring = Ring(config.ring, f"{config.seed} {self.step}")  # gone on with, never the same scenes again

    def _moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors by name."""
        states = enumerate(self.optimizer.state_dict()["state"].items())
        return {f"optimizer.{i}.{name}": t for i, (_, state) in states for name, t in state.items()}

    def _save(self) -> None:
        self.averaged.save_pretrained(self.config.out)
        tensors = {f"judge.{n}": t for n, t in self.judge.state_dict().items()}
        tensors |= {f"averaged.{n}": t for n, t in self.averaged.state_dict().items()} | self._moments()
        counters = {"step": str(self.step), "elapsed": str(self.elapsed)}
        write_bytes(self.state_file, save({n: t.contiguous() for n, t in tensors.items()}, metadata=counters))

    def _resume(self) -> None:
        with safe_open(self.state_file, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            counters = file.metadata()
        for part, module in (("judge.", self.judge), ("averaged.", self.averaged)):
            module.load_state_dict({n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)})
        state = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, moment = name.split(".")
                state["state"].setdefault(int(i), {})[moment] = tensor
        self.optimizer.load_state_dict(state)
        self.step, self.elapsed = int(counters["step"]), float(counters["elapsed"])

    def _say(self, **values: object) -> None:
        line = json.dumps({"minute": round(self.elapsed / 60, 2), "step": self.step, **values})
        print(line, flush=True)

    def _find_autoencoder(self) -> None:
        folder = self.config.autoencoder
        if folder is not None and self.reconstruct is None and (folder / "config.json").is_file():
            self.reconstruct = load_reconstruct(folder)
            self._say(note=f"reconstructions of {folder} join")

    def _train_step(self, generator: torch.Generator) -> dict[str, float]:
        config = self.config
        through = min(1.0, self.elapsed / (60 * config.minutes))
        rate = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * through))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rate * min(1.0, (self.step + 1) / config.warmup)
        batch = self.ring.draw(config.batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            raw = self.judge(batch.pictures_BCHW)
        parts = losses(raw, batch, self.answers)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.stack(list(parts.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.judge.parameters(), 5.0)
        self.optimizer.step()
        keep = min(config.average, (1 + self.step) / (10 + self.step))
        for mean, now in zip(self.averaged.state_dict().values(), self.judge.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, 1 - keep)
        self.step += 1
        return {name: float(t.detach()) for name, t in parts.items()}

    def run(self) -> None:
        """Trains until the minutes are used up."""
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        self.judge.train()
        self._find_autoencoder()
        self.ring.refill(config.start, self.reconstruct)
        self._say(note=f"{self.ring.filled} renders to start with")
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        trail: dict[str, float] = {}
        before = saved = time.monotonic()
        while self.elapsed < 60 * config.minutes:
            if self.step % _LOOK_FOR_AUTOENCODER == 0:
                self._find_autoencoder()
            self.ring.refill(config.fresh, self.reconstruct)
            if self.reconstruct is not None and self.step % 8 == 0:
                self.ring.add_decoded(self.reconstruct.garbage(16, generator))
            parts = self._train_step(generator)
            trail = {n: 0.97 * trail.get(n, x) + 0.03 * x for n, x in parts.items()}
            now = time.monotonic()
            self.elapsed, before = self.elapsed + now - before, now
            if self.step % 50 == 0:
                self._say(**{n: round(x, 3) for n, x in trail.items()})
            if now - saved > _CHECKPOINT_SECONDS:
                self._save()
                self._say(**quick_look(self.averaged, config.look))
                saved = time.monotonic()
        self._save()
        self._say(**quick_look(self.averaged, config.look), done=True)


class AutoencoderReconstruct:
    """Passes pictures through the tokenizer as a generator would: latents a little off, or hopelessly so."""

    def __init__(self, folder: Path) -> None:
        from mm.tokenizers import Autoencoder

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
    def garbage(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Pictures in [0, 1] decoded from mixtures of two scenes, from drowned ones and from noise, a third each."""
        rng = random.Random(int(torch.randint(2**40, (), generator=generator)))
        latents_BCHW = self._latents(render([sample_judge_scene(rng) for _ in range(count)]))
        noise = torch.randn(latents_BCHW.shape, generator=generator)
        third = count // 3
        mixed = torch.lerp(latents_BCHW, latents_BCHW.roll(1, 0), 0.5)[:third]
        drowned = (latents_BCHW + 1.2 * noise)[third : 2 * third]
        latents_BCHW = torch.cat([mixed, drowned, noise[2 * third :]])
        return (self.autoencoder.decode(latents_BCHW).clamp(-1, 1) + 1) / 2


def load_reconstruct(folder: Path) -> AutoencoderReconstruct:
    """The trained autoencoder in `folder`."""
    return AutoencoderReconstruct(folder)


def agrees(reading: Reading, scene: Scene, *, near: float = 8.0) -> bool:
    """Whether a reading has exactly the scene's objects, each in place and answering to its colour."""
    if not reading.readable or len(reading.objects) != len(scene.sprites):
        return False
    hue = v.shows_colour(scene.style)
    for s in scene.sprites:
        seen = [f for f in reading.objects if f.object == s.object and max(abs(f.x - s.x), abs(f.y - s.y)) <= near]
        if not any(not hue or f.answers_to(s.colour) for f in seen):
            return False
    return True


def quick_look(judge: Judge, count: int) -> dict[str, float]:
    """Share of fresh renders read without any mistake, and the shares of styles and backgrounds read right."""
    rng = random.Random("judge quick look")
    scenes = [sample_judge_scene(rng) for _ in range(count)]
    readings = [r for start in range(0, count, 32) for r in judge.read(render(scenes[start : start + 32]))]
    pairs = list(zip(readings, scenes, strict=True))
    return {
        "exact": round(sum(agrees(r, s) for r, s in pairs) / count, 3),
        "readable": round(sum(r.readable for r in readings) / count, 3),
        "style": round(sum(r.style == s.style for r, s in pairs) / count, 3),
        "background": round(sum(r.background == s.background for r, s in pairs) / count, 3),
    }


def ceilings(
    judge: Judge, *, per_task: int = 400, seed: int = 0, reconstruct: AutoencoderReconstruct | None = None
) -> dict[str, dict[str, float]]:
    """Share of true pictures granted, per task and style; key "all" is the share over the styles together."""
    table: dict[str, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(seed)
    for task in TASKS:
        styles = [s for s in v.STYLES if v.shows_colour(s) or not task.startswith("colour")]
        rng = random.Random(f"judge check {seed} {task}")
        n = math.ceil(per_task / len(styles))
        asked = [sample_task(rng, task, style=style, objects=v.ALL_OBJECTS) for style in styles for _ in range(n)]
        granted: list[bool] = []
        for start in range(0, len(asked), 32):
            part = asked[start : start + 32]
            pictures = render([scene for scene, _ in part])
            if reconstruct is not None:
                pictures = reconstruct(pictures, generator)
            verdicts = [satisfies(r, e) for r, (_, e) in zip(judge.read(pictures), part, strict=True)]
            granted += [x.ok for x in verdicts]
        table[task] = {"all": sum(granted) / len(granted)}
        table[task] |= {style: sum(granted[i * n : (i + 1) * n]) / n for i, style in enumerate(styles)}
    return table


def _print_ceilings(table: dict[str, dict[str, float]]) -> None:
    print(f"{'':20s}{'all':>11s}" + "".join(f"{style:>11s}" for style in v.STYLES))
    for task, row in table.items():
        cells = (f"{row[c]:11.3f}" if c in row else f"{'-':>11s}" for c in ("all", *v.STYLES))
        print(f"{task:20s}" + "".join(cells))


def main() -> None:
    """The command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to train into (and to go on from), or to check")
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder", type=Path, help="folder of a trained autoencoder; may appear later")
    parser.add_argument(
        "--check", action="store_true", help="print the ceiling of the judge in --out (or the shipped one)"
    )
    parser.add_argument("--per-task", type=int, default=400)
    args = parser.parse_args()
    if args.check:
        reconstruct = load_reconstruct(args.autoencoder) if args.autoencoder else None
        judge = Judge.from_pretrained(args.out)
        _print_ceilings(ceilings(judge, per_task=args.per_task, seed=args.seed, reconstruct=reconstruct))
        return
    if args.out is None:
        parser.error("--out is needed for training")
    config = JudgeStageConfig(out=args.out, minutes=args.minutes, seed=args.seed, autoencoder=args.autoencoder)
    JudgeTrainer(config).run()


if __name__ == "__main__":
    main()
