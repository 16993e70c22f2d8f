"""The fingerprint stage: `mm train mm-tiny --stage fingerprint --init-from weights/mm-tiny`.

Design choices
- The autoencoder stays as it is; what is trained lies beside it (`mm.provenance.training`), so that the trainer of the
  other stages is not used.
- Scenes are rendered and encoded once, and stay on the device.
- What is reported was measured on the written file, on renders that were not trained on. It is the last line of
  `log.jsonl`, after those of the training.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.core.files import write_json
from mm.provenance.fingerprint import Fingerprint, FingerprintConfig, fingerprint_of
from mm.provenance.measuring import measure
from mm.provenance.report import FINGERPRINT
from mm.provenance.training import FingerprintTraining, Step, train_fingerprint
from mm.tokenizers import Autoencoder
from mm.training.stage import StageContext, device, override
from mm.world.render import render
from mm.world.scene import sample_scene

LOG = "log.jsonl"
_SHOWN = 10  # measured steps for each printed one
_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class FingerprintData:
    """Scenes of the stage.

    Attributes:
        scenes: to train on.
        held_out: to report on.
    """

    scenes: int = 4096
    held_out: int = 128

    def __post_init__(self) -> None:
        for name in ("scenes", "held_out"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")


def fit_fingerprint(context: StageContext) -> dict[str, Any]:
    """Trains a fingerprint of the published autoencoder, or resumes; writes it beside the model's parts.

    Returns:
        The report of `mm.provenance.measuring.measure`, of the written file.
    """
    section, place = context.config["fingerprint"], device()
    config = override(FingerprintTraining(**section["trainer"]), context.flags)
    data = FingerprintData(**section["data"])
    settings = FingerprintConfig(**{key: _tuple(value) for key, value in section["stage"].items()})
    if place == "cuda":
        torch.backends.cudnn.benchmark = True
    autoencoder = context.load(Autoencoder, "autoencoder").float().to(place).requires_grad_(False)
    torch.manual_seed(config.seed)
    print(f"rendering and encoding {data.scenes} scenes", flush=True)
    latents, originals = encoded(autoencoder, data.scenes, f"fingerprint {config.seed}", place)
    made = fingerprint_of(autoencoder, lambda: autoencoder.decode(latents[:1]), settings).to(place)
    work = context.state / "fingerprint"
    train_fingerprint(
        made, autoencoder, autoencoder.decoder, latents, config, originals=originals, work=work,
        on_step=lambda step: _shown(step, work / LOG),
    )  # fmt: skip
    file = context.published / FINGERPRINT
    made.save(file)
    report = report_of(file, autoencoder, data.held_out, place)
    Fingerprint.load(file).save(file, report)
    write_json(work / "report.json", report)
    _log(report, work / LOG)
    return report


def report_of(file: Path, autoencoder: Autoencoder, count: int, place: str) -> dict[str, Any]:
    """What a fingerprint's file does on held-out renders."""
    latents, originals = encoded(autoencoder, count, "fingerprint held out", place)
    return measure(
        Fingerprint.load(file).to(place), autoencoder, autoencoder.decoder, latents, originals=originals.float() / 255
    )


@torch.no_grad()
def encoded(autoencoder: Autoencoder, count: int, salt: str, place: str) -> tuple[Tensor, Tensor]:
    """Latents (N, 16, 8, 8) and bytes (N, 3, 128, 128) of renders, on a device."""
    rng = random.Random(salt)
    latents, originals = [], []
    for first in range(0, count, _AT_ONCE):
        pictures = render([sample_scene(rng) for _ in range(min(_AT_ONCE, count - first))], place)
        originals.append(pictures)
        latents.append(autoencoder.encode(pictures.float() / 127.5 - 1).float())
    return torch.cat(latents), torch.cat(originals)


def _shown(step: Step, log: Path) -> None:
    if step.number // 20 % _SHOWN == 0:
        _log({k: round(x, 4) for k, x in vars(step).items()}, log)


def _log(row: dict[str, Any], log: Path) -> None:
    """Writes a JSON line to the log and to the terminal."""
    print(json.dumps(row), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
