"""One encoder for reading and drawing, or two: the ablation of the decoupled encoders, and AIA.

    python -m mm.training.studies.encoders --out runs/encoders [--samples 30000] [--arms decoupled,shared,shared-aia]

Design choices
- Three arms with one budget; each trains a small trunk to read (the whole world) and to draw (the small world), three
  steps of drawing for one of reading. `shared`: the generation tokenizer's latents are also what is read. `decoupled`:
  reading goes through the published understanding encoder. Both encoders are frozen, as they are in the published
  model's joint stage.
- `shared-aia`: shared, plus attention-interaction alignment (AIA, arXiv 2511.22663): in every layer the attention mass
  that crosses modalities is pulled to a target by a Huber loss of weight 40. The targets are what the decoupled arm had
  at its end, so that arm runs first.
- Mass: of words on understanding tokens in the text layers while reading, of picture tokens on words in the picture
  layers while drawing.

Legend: B batch, H heads, L queries, K keys, T words.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mm.core.files import write_json
from mm.core.paths import resolve_model, weights_dir
from mm.core.statistics import paired_change, share
from mm.models import layers
from mm.models.connectors import Connector
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.tokenizers import Autoencoder, Bridge
from mm.training.drawing_stage import Drawing
from mm.training.studies import common
from mm.training.studies.common import Exam, Pool, StudyConfig
from mm.world.judge import Judge

ARMS: tuple[str, ...] = ("decoupled", "shared", "shared-aia")
AIA_WEIGHT = 40.0
UNDERSTANDING_TOKEN = 6  # the placeholder's id


class Masses:
    """Collects a step's cross-modal attention mass per layer."""

    def __init__(self) -> None:
        self.masses: list[torch.Tensor] = []
        self.understanding_BT: torch.Tensor | None = None  # set while reading
        self.replies_BT: torch.Tensor | None = None

    def add(self, weights_BHLK: torch.Tensor) -> None:
        """Adds the mass of one attention that crosses modalities; an `attention_callback`."""
        queries, keys = weights_BHLK.shape[2:]
        if self.understanding_BT is not None and self.replies_BT is not None:
            onto = (weights_BHLK.float() * self.understanding_BT[:, None, None]).sum(-1).mean(1)
            self.masses.append(onto[self.replies_BT].mean())
        elif keys > queries:  # picture tokens, which attend to the prompt's keys before their own
            self.masses.append(weights_BHLK[..., : keys - queries].float().sum(-1).mean())

    def take(self) -> torch.Tensor:
        """Masses (layers,) since the last call."""
        out, self.masses = torch.stack(self.masses), []
        return out


class Model(nn.Module):
    """A small trunk that draws, the connector it reads through, and the frozen encoder before that."""

    def __init__(self, arm: str, drawing: Drawing, autoencoder: Autoencoder, encoder: UnderstandingEncoder) -> None:
        if arm not in ARMS:
            raise ValueError(f"unknown arm {arm!r}; known: {', '.join(ARMS)}")
        super().__init__()
        self.drawing = drawing
        width = drawing.trunk.config.width
        self.decoupled = arm == "decoupled"
        channels = encoder.config.width if self.decoupled else autoencoder.config.latent_channels
        self.connector = Connector(in_channels=channels, width=width, hidden=2 * width)
        self._frozen = [autoencoder.eval(), encoder.eval()]

    def understanding_tokens(self, pictures: torch.Tensor) -> torch.Tensor:
        """Understanding tokens by this arm's encoder."""
        autoencoder, encoder = self._frozen
        with torch.no_grad():
            tokens = encoder(pictures)[1] if self.decoupled else autoencoder.encode(pictures)
        return self.connector(tokens)


def train_arm(
    model: Model,
    pools: tuple[Pool, Pool, torch.Tensor],
    targets: dict[str, torch.Tensor] | None,
    config: StudyConfig,
    on_step: Callable[[int, float], None],
) -> dict[str, list[float]]:
    """Reads and draws in turn; returns the mean masses of the last fifth of the steps."""
    reading, drawn, latents = pools
    steps = 4 * (config.samples // config.batch_size)
    late: dict[str, list[torch.Tensor]] = {"read": [], "draw": []}
    masses = Masses()

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(f"study encoders {config.seed} {step}")
        task = "draw" if step % 4 else "read"
        with layers.attention_callback(masses.add):
            if task == "read":
                pictures, scenes = reading.draw(config.batch_size, rng)
                words = common.reading_words(scenes, rng, config)
                masses.understanding_BT, masses.replies_BT = words.ids == UNDERSTANDING_TOKEN, words.targets >= 0
                total = common.reading_loss(model.drawing.trunk, words, model.understanding_tokens(pictures))
                masses.understanding_BT = masses.replies_BT = None
            else:
                index = [rng.randrange(len(latents)) for _ in range(common.DRAWN_BATCH)]
                batch = common.drawing_batch(latents[index], [drawn.scenes[i] for i in index], rng)
                total = torch.stack(list(model.drawing(batch).values())).sum()
        now = masses.take()
        if step >= min(0.8 * steps, steps - 4):
            late[task].append(now.detach())
        return total if targets is None else total + AIA_WEIGHT * F.huber_loss(now, targets[task])

    common.fit([(model, config.rate)], loss, steps, on_step=on_step)
    return {task: torch.stack(rows).mean(0).tolist() for task, rows in late.items()}


def run_arm(
    arm: str,
    parts: tuple[Autoencoder, Bridge, UnderstandingEncoder],
    pools: tuple[Pool, Pool, torch.Tensor],
    paper: Exam,
    masses: dict[str, list[float]] | None,
    config: StudyConfig,
) -> dict[str, Any]:
    """Trains and measures one arm: a JSON-able result."""
    began = time.monotonic()
    autoencoder, bridge, encoder = parts
    torch.manual_seed(config.seed + 3)
    model = Model(arm, common.drawing_module(config, bridge), autoencoder, encoder)
    targets = None
    if arm == "shared-aia":
        if masses is None:
            raise ValueError("shared-aia takes its targets from the decoupled arm; run that first")
        targets = {task: torch.tensor(row) for task, row in masses.items()}
    found = train_arm(model, pools, targets, config, lambda step, x: print(f"{arm} {step}: {x:.3f}", flush=True))
    model.eval()
    return {
        "answers": common.take_exam(model.drawing.trunk, model.understanding_tokens, paper),
        "drawing": common.drawing_verdicts(model.drawing, autoencoder, Judge.from_pretrained(weights_dir() / "judge")),
        "masses": found,
        "seconds": round(time.monotonic() - began),
    }


def summary(results: dict[str, Any], paper: Exam, config: StudyConfig) -> dict[str, Any]:
    """The table: scores per arm and changes against `shared`, with intervals."""
    base, clusters = results.get("shared"), [i for i, _ in paper.asked]
    rows = {}
    for name, result in results.items():
        row: dict[str, Any] = {"understanding": share(result["answers"]), "drawing": share(result["drawing"])}
        row |= {"masses": result["masses"], "seconds": result["seconds"]}
        if base is not None and name != "shared":
            places: Sequence[int] = [i // 4 for i in range(len(result["drawing"]))]
            pairs = (("answers", "change", clusters), ("drawing", "drawing_change", places))
            for key, called, groups in pairs:
                row[called] = [round(x, 4) for x in paired_change(base[key], result[key], groups)]
        rows[name] = row
    return {"arms": rows, "n": len(paper.asked), "settings": asdict(config) | {"aia_weight": AIA_WEIGHT}}


def main() -> None:
    parser = argparse.ArgumentParser(description="One encoder or two, and alignment of attention between tasks.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the arms' results; the table is OUT.json")
    parser.add_argument("--model", default="mm-tiny", help="published model whose encoders are used")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument(
        "--samples", type=int, default=StudyConfig.samples, help="read; three smaller batches are drawn for each"
    )
    parser.add_argument("--questions", type=int, default=StudyConfig.questions)
    parser.add_argument("--pool", type=int, default=StudyConfig.pool)
    args = parser.parse_args()
    config = StudyConfig(samples=args.samples, questions=args.questions, pool=args.pool)
    folder = Path(resolve_model(args.model))
    autoencoder = Autoencoder.from_pretrained(folder / "autoencoder").float()
    bridge = Bridge.from_pretrained(folder / "bridge").float()
    encoder = UnderstandingEncoder.from_pretrained(folder / "understanding_encoder").float()
    drawn, paper = common.drawing_pool(config), common.exam(config)
    pools = (common.reading_pool(config), drawn, common.encoded(autoencoder, drawn))
    results: dict[str, Any] = {}
    for name in args.arms.split(","):
        file = args.out / f"{name}.json"
        if not file.is_file():
            masses = results["decoupled"]["masses"] if "decoupled" in results else None
            write_json(file, run_arm(name, (autoencoder, bridge, encoder), pools, paper, masses, config))
        results[name] = json.loads(file.read_text())
        report = summary(results, paper, config)
        write_json(args.out.with_suffix(".json"), report)
        print(json.dumps({name: report["arms"][name]}), flush=True)


if __name__ == "__main__":
    main()
