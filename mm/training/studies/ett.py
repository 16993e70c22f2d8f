"""End-to-end tuning of the generation tokenizer (ETT, Wang et al. 2025, arXiv 2505.10562) over TokenBridge's bins.

    python -m mm.training.studies.ett --out runs/ett [--samples 60000] [--arms indices,frozen,...]

Design choices
- Five arms with one budget: `indices` (the reader learns a vector for every code), `frozen` (it reads the codes'
  dequantized values), and `tuned` at alpha 0, 0.25 and 1, whose loss is caption and questions + alpha * reconstruction.
- ETT's stages: the projector alone; projector, trunk and tokenizer; projector and trunk with the tokenizer frozen.
  There they start from an instruction-tuned language model. Here they start from a trunk that was trained to read
  through the understanding encoder, once for all arms: from a fresh trunk no arm used the picture within 18 thousand
  samples, so that tokenizers could not be compared.
- The pictures to read are of a small world, for the same reason.
- TokenBridge's bins come after training and pass no gradient: while tuning, codes are straight-through over the
  bridge's centres (`Bridge.straight_through`), and latents keep their scale by batch statistics, as in the
  autoencoder's own stage. Then the encoder is frozen, its channels measured anew, bins and order refitted.
- Reconstruction is in units of the untuned tokenizer's loss, so that alpha means the same for any loss.
- Drawing afterwards: a small model trained on each distinct tokenizer, on the small world of `common`.

Legend: B batch, C = 16 channels, L = 64 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mm.core.files import write_json
from mm.core.paths import resolve_model, weights_dir
from mm.core.picture_metrics import psnr
from mm.core.statistics import paired_change, share
from mm.models.connectors import Connector
from mm.models.trunk import Trunk
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.tokenizers import Autoencoder, Bridge
from mm.training.studies import common
from mm.training.studies.common import Exam, Pool, StudyConfig
from mm.training.tokenizer_data import held_out_scenes, reconstruction_loss, to_float
from mm.world.judge import Judge
from mm.world.render import render
from mm.world.vocabulary import STYLES

ALPHAS: dict[str, float] = {"tuned-0": 0.0, "tuned-0.25": 0.25, "tuned-1": 1.0}
ARMS: tuple[str, ...] = ("indices", "frozen", *ALPHAS)
STAGES: tuple[float, float, float] = (0.1, 0.5, 0.4)  # shares of the samples
READER_SHARE = 0.5  # of an arm's samples, for the reader that all start from
TOKENIZER_RATE = 0.2  # of the trunk's


class IndexTable(nn.Module):
    """A learned vector for every code of every channel, summed over a token's channels."""

    def __init__(self, bridge: Bridge, width: int) -> None:
        super().__init__()
        channels, levels = bridge.config.channels, bridge.config.levels
        self.table = nn.Embedding(channels * levels, width)
        nn.init.normal_(self.table.weight, std=channels**-0.5)
        self.register_buffer("first", (torch.arange(channels) * levels).view(1, -1, 1, 1), persistent=False)
        self.first: torch.Tensor

    def forward(self, codes_BCHW: torch.Tensor) -> torch.Tensor:
        """Tokens (B, width, H, W)."""
        return self.table(codes_BCHW + self.first).sum(1).permute(0, 3, 1, 2)


class Arm:
    """One run: a tokenizer with its bridge, a projector and a trunk."""

    def __init__(self, name: str, autoencoder: Autoencoder, bridge: Bridge, trunk: Trunk, config: StudyConfig) -> None:
        if name not in ARMS:
            raise ValueError(f"unknown arm {name!r}; known: {', '.join(ARMS)}")
        self.name, self.config = name, config
        self.autoencoder, self.bridge, self.trunk = autoencoder, bridge, trunk
        torch.manual_seed(config.seed + 2)
        self.table = IndexTable(bridge, config.width) if name == "indices" else None
        channels = config.width if self.table is not None else bridge.config.channels
        self.projector = Connector(in_channels=channels, width=config.width, hidden=2 * config.width)
        self.through_bins: Callable[[torch.Tensor], torch.Tensor] = bridge.straight_through
        self.untuned_loss = 1.0

    @property
    def front(self) -> nn.ModuleList:
        """What stands between codes and trunk."""
        return nn.ModuleList([self.projector, *([self.table] if self.table is not None else [])])

    def understanding_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """Understanding tokens of pictures by the frozen tokenizer's codes."""
        with torch.no_grad():
            codes = self.bridge.quantize(self.autoencoder.encode(pictures).float())
            values = self.bridge.dequantize(codes)
        return self.projector(values if self.table is None else self.table(codes))

    def tuning_loss(self, pictures: torch.Tensor, words: Any, alpha: float) -> torch.Tensor:
        """Caption and questions + alpha * reconstruction, with gradients down to the pixels."""
        latents, _ = self.autoencoder.training_latents(pictures.contiguous(memory_format=torch.channels_last))
        through = self.through_bins(latents)
        loss = common.reading_loss(self.trunk, words, self.projector(through))
        if alpha == 0:
            return loss
        decoded = self.autoencoder.decoder(through)
        return loss + alpha * reconstruction_loss(decoded, pictures, 0.5) / self.untuned_loss

    @torch.no_grad()
    def measure_untuned(self, pool: Pool) -> None:
        """The reconstruction loss that alpha is counted in."""
        pictures = pool.pictures[:256].float() / 127.5 - 1
        decoded = self.autoencoder.decoder(self.bridge(self.autoencoder.encode(pictures)))
        self.untuned_loss = float(reconstruction_loss(decoded, pictures, 0.5))

    @torch.no_grad()
    def refit(self, pool: Pool) -> None:
        """Freezes the encoder: channels measured anew, then bins and order."""
        raw = torch.cat([self.autoencoder.raw_latents(p.float() / 127.5 - 1) for p in pool.pictures[:4096].split(128)])
        mean, std = (x.tolist() for x in (raw.mean((0, 2, 3)), raw.std((0, 2, 3))))
        self.autoencoder.register_to_config(latents_mean=mean, latents_std=std)
        self.autoencoder.requires_grad_(False)
        self.bridge = Bridge.fit(common.encoded(self.autoencoder, Pool(pool.scenes[:2048])))


def reader(config: StudyConfig, pool: Pool, encoder: UnderstandingEncoder) -> Trunk:
    """A trunk that reads through the understanding encoder: the vision-language model that ETT begins with.

    Its connector is thrown away: every arm learns a projector of its own.
    """
    trunk, encoder = common.small_trunk(config), encoder.requires_grad_(False).eval()
    torch.manual_seed(config.seed + 3)
    connector = Connector(in_channels=encoder.config.width, width=config.width, hidden=2 * config.width)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(f"study reader {config.seed} {step}")
        pictures, scenes = pool.draw(config.batch_size, rng)
        with torch.no_grad():
            tokens = encoder(pictures)[1]
        return common.reading_loss(trunk, common.reading_words(scenes, rng, config), connector(tokens))

    steps = max(1, int(READER_SHARE * config.samples) // config.batch_size)
    common.fit([(trunk, config.rate), (connector, config.rate)], loss, steps, decay=False)
    return trunk


def train_arm(arm: Arm, pool: Pool, log: Callable[[str], None]) -> None:
    """The three stages."""
    config, alpha = arm.config, ALPHAS.get(arm.name)
    arm.measure_untuned(pool)
    front, steps = arm.front, [max(1, int(s * config.samples) // config.batch_size) for s in STAGES]

    def loss(step: int, stage: int) -> torch.Tensor:
        rng = random.Random(f"study {config.seed} {stage} {step}")
        pictures, scenes = pool.draw(config.batch_size, rng)
        words = common.reading_words(scenes, rng, config)
        if stage == 1 and alpha is not None:
            return arm.tuning_loss(pictures, words, alpha)
        return common.reading_loss(arm.trunk, words, arm.understanding_tokens(pictures))

    def logger(stage: int) -> Callable[[int, float], None]:
        return lambda step, value: log(f"{arm.name} stage {stage + 1} step {step}: {value:.3f}")

    arm.trunk.requires_grad_(False)
    arm.autoencoder.requires_grad_(False)
    common.fit([(front, config.rate)], lambda step: loss(step, 0), steps[0], decay=False, on_step=logger(0))
    arm.trunk.requires_grad_(True)
    modules: list[tuple[nn.Module, float]] = [(front, config.rate), (arm.trunk, config.rate)]
    if alpha is None:
        common.fit(modules, lambda step: loss(step, 1), steps[1], decay=False, on_step=logger(1))
    else:
        arm.autoencoder.encoder.requires_grad_(True)
        arm.autoencoder.decoder.requires_grad_(alpha > 0)
        tuned: list[tuple[nn.Module, float]] = [*modules, (arm.autoencoder, TOKENIZER_RATE * config.rate)]
        common.fit(tuned, lambda step: loss(step, 1), steps[1], decay=False, on_step=logger(1))
        arm.refit(pool)
    common.fit(modules, lambda step: loss(step, 2), steps[2], on_step=logger(2))


@torch.no_grad()
def reconstruction(autoencoder: Autoencoder, bridge: Bridge, each: int = 12) -> float:
    """Mean PSNR in dB through the bridge, over held-out renders of every style."""
    out = []
    for style in STYLES:
        pictures = to_float(render(held_out_scenes(style, each)))
        again = autoencoder.decode(bridge(autoencoder.encode(pictures)))
        out += psnr(again, pictures, data_range=2.0).tolist()
    return sum(out) / len(out)


def drawing_score(autoencoder: Autoencoder, bridge: Bridge, judge: Judge, config: StudyConfig) -> list[bool]:
    """Trains a small model on the tokenizer's latents and has it draw."""
    pool = common.drawing_pool(config)
    latents = common.encoded(autoencoder, pool)
    module = common.drawing_module(config, bridge)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(f"study drawing {config.seed} {step}")
        index = [rng.randrange(len(latents)) for _ in range(common.DRAWN_BATCH)]
        batch = common.drawing_batch(latents[index], [pool.scenes[i] for i in index], rng)
        return torch.stack(list(module(batch).values())).sum()

    common.fit([(module, config.rate)], loss, max(1, config.drawn // common.DRAWN_BATCH))
    return common.drawing_verdicts(module, autoencoder, judge)


def run_arm(name: str, start: tuple[Autoencoder, Bridge, Trunk], pool: Pool, paper: Exam, config: StudyConfig) -> Any:
    """Trains and measures one arm: a JSON-able result."""
    began = time.monotonic()
    autoencoder, bridge, trunk = copy.deepcopy(start)
    arm = Arm(name, autoencoder, bridge, trunk, config)
    train_arm(arm, pool, lambda line: print(line, flush=True))
    arm.trunk.eval()
    answers = common.take_exam(arm.trunk, arm.understanding_tokens, paper)
    result: dict[str, Any] = {
        "answers": answers,
        "reconstruction": round(reconstruction(arm.autoencoder, arm.bridge), 3),
        "order": arm.bridge.order,
        "seconds": round(time.monotonic() - began),
    }
    if config.drawn and name != "indices":  # the same tokenizer as `frozen`
        result["drawing"] = drawing_score(
            arm.autoencoder, arm.bridge, Judge.from_pretrained(weights_dir() / "judge"), config
        )
    return result


def summary(results: dict[str, Any], paper: Exam, config: StudyConfig) -> dict[str, Any]:
    """The table: scores per arm, and changes against `frozen` with their intervals."""
    base = results.get("frozen")
    clusters = [i for i, _ in paper.asked]
    rows = {}
    for name, result in results.items():
        kinds = {qa.kind for _, qa in paper.asked}
        row: dict[str, Any] = {"understanding": share(result["answers"])}
        row["kinds"] = {
            k: share([x for x, (_, qa) in zip(result["answers"], paper.asked, strict=True) if qa.kind == k])["score"]
            for k in sorted(kinds)
        }
        row |= {k: result[k] for k in ("reconstruction", "seconds")}
        if "drawing" in result:
            row["drawing"] = share(result["drawing"])
        if base is not None and name != "frozen":
            row["change"] = [round(x, 4) for x in paired_change(base["answers"], result["answers"], clusters)]
            if "drawing" in result:
                places = [i // 4 for i in range(len(result["drawing"]))]
                change = paired_change(base["drawing"], result["drawing"], places)
                row["drawing_change"] = [round(x, 4) for x in change]
        rows[name] = row
    return {"arms": rows, "n": len(paper.asked), "settings": asdict(config) | {"stages": STAGES}}


def main() -> None:
    parser = argparse.ArgumentParser(description="ETT's table: indices, frozen and tuned embeddings.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the arms' results, and of ett.json")
    parser.add_argument("--model", default="mm-tiny", help="published model whose tokenizer is tuned")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--samples", type=int, default=StudyConfig.samples)
    parser.add_argument("--drawn", type=int, default=StudyConfig.drawn, help="samples of the drawing run; 0 for none")
    parser.add_argument("--questions", type=int, default=StudyConfig.questions)
    parser.add_argument("--pool", type=int, default=StudyConfig.pool)
    parser.add_argument("--whole-world", action="store_true", help="read all objects and styles, not the small world's")
    args = parser.parse_args()
    budget = {"samples": args.samples, "drawn": args.drawn, "questions": args.questions, "pool": args.pool}
    config = StudyConfig(**budget, small=not args.whole_world)
    folder = Path(resolve_model(args.model))
    autoencoder = Autoencoder.from_pretrained(folder / "autoencoder").float()
    bridge = Bridge.from_pretrained(folder / "bridge").float()
    encoder = UnderstandingEncoder.from_pretrained(folder / "understanding_encoder").float()
    pool, paper = common.reading_pool(config), common.exam(config)
    trunk: Trunk | None = None
    results: dict[str, Any] = {}
    for name in args.arms.split(","):
        file = args.out / f"{name}.json"
        if not file.is_file():  # a stopped study goes on with the arm it was at
            trunk = reader(config, pool, encoder) if trunk is None else trunk
            write_json(file, run_arm(name, (autoencoder, bridge, trunk), pool, paper, config))
        results[name] = json.loads(file.read_text())
        report = summary(results, paper, config)
        write_json(args.out.with_suffix(".json"), report)
        print(json.dumps({name: report["arms"][name]}), flush=True)


if __name__ == "__main__":
    main()
