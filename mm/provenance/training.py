"""Trains a fingerprint on a decoder that stays as it is: bits that can be read, in pictures that hardly change.

Design choices
- The loss is cross-entropy of the bits plus a penalty on the squared change of the picture above its budget, which is
  given as a peak signal-to-noise ratio against the plain decoder's picture.
- Pictures are attacked from the time that bits can be read at all.
- The state lies in one file, written by rename; step k depends on (seed, k) alone.

Legend: B pictures, K bits, N latents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.safe_tensors import read_tensors
from mm.provenance.attacks import MEASURED, random_attack, rounded
from mm.provenance.fingerprint import PRESENT, Fingerprint
from mm.provenance.readers import TileReader

_HARD = 0.9  # share of bits read from which pictures are attacked
STATE = "fingerprint-state.safetensors"
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class FingerprintTraining:
    """Settings of a run.

    Attributes:
        steps: at most so many.
        batch_size: B.
        learning_rate: of the reader.
        change_rate: of what the bits change.
        psnr: budget of the change, in dB against the plain decoder's picture.
        psnr_first: budget of the first step; it rises to `psnr` over two fifths of the run.
        penalty: weight of what exceeds it.
        spread: of the starting values.
        seed: of everything drawn.
        save_every: steps between two saves of the state.
    """

    steps: int = 3000
    batch_size: int = 8
    learning_rate: float = 2e-3
    change_rate: float = 5e-3
    psnr: float = 35.5
    psnr_first: float = 24.0
    penalty: float = 2.0
    spread: float = 0.01
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("learning_rate", "change_rate", "psnr", "psnr_first", "penalty", "spread"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step has measured: share of bits read, PSNR of the change in dB."""

    number: int
    loss: float
    read: float
    psnr: float


def train_fingerprint(
    fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor, config: FingerprintTraining, *,
    work: Path | None = None, seconds: float | None = None, on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:  # fmt: skip
    """Trains in place.

    Args:
        fingerprint: as `fingerprint_of` made it.
        module: that holds the convolutions; its weights stay.
        decode: latents (B, ...) to pictures in [-1, 1] with gradients, by the module.
        latents: (N, ...), of pictures such as the model draws.
        config: see `FingerprintTraining`.
        work: folder of the state; None keeps none.
        seconds: of this call at most.
        on_step: called after each step.

    Returns:
        The steps of this call.
    """
    run = _Run(fingerprint, module, decode, latents, config, work)
    started, done = time.monotonic(), []
    while run.number < config.steps and (seconds is None or time.monotonic() - started < seconds):
        done.append(run.step())
        on_step(done[-1])
        if run.number % config.save_every == 0:
            run.save()
    run.save()
    return done


class _Run:
    def __init__(
        self, fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor,
        config: FingerprintTraining, work: Path | None,
    ) -> None:  # fmt: skip
        self.fingerprint, self.module, self.decode = fingerprint, module, decode
        self.latents, self.config, self.number, self.share = latents, config, 0, 0.5
        fingerprint.start(config.spread, torch.Generator().manual_seed(config.seed))
        changes = [*fingerprint.scale.values(), *fingerprint.shift.values()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(fingerprint.reader.parameters()), "lr": config.learning_rate},
                {"params": changes, "lr": config.change_rate},
            ],
            betas=(0.9, 0.99), weight_decay=1e-4,
        )  # fmt: skip
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.file = None if work is None else work / STATE
        if self.file is not None and self.file.is_file():
            self._resume(self.file)

    def step(self) -> Step:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.number)
        chosen = torch.randint(len(self.latents), (config.batch_size,), generator=generator)
        bits_BK = torch.randint(2, (config.batch_size, self.fingerprint.config.bits), generator=generator).float()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            left = 1 - self.number / config.steps
            group["lr"] = rate * min(1.0, (self.number + 1) / 20, 0.02 + 2 * left)
        latents = self.latents[chosen]
        bits_BK = bits_BK.to(latents.device)
        with torch.no_grad():
            plain = self.decode(latents) / 2 + 0.5
        with self.fingerprint.modulating(self.module, bits_BK):
            marked = self.decode(latents) / 2 + 0.5
        error = (marked - plain).square().mean()
        present, absent = self._logits(marked, plain, generator)
        logits = present[:, :-1]
        budget = 10 ** (-self._decibels() / 10)
        over = (error / budget - 1).clamp_min(0) + 0.1 * error / budget
        found = F.softplus(-present[:, -1]).mean() + F.softplus(absent[:, -1]).mean()
        loss = F.binary_cross_entropy_with_logits(logits, bits_BK) + 0.2 * found + config.penalty * 0.1 * over
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.fingerprint.parameters(), 1.0)
        self.optimizer.step()
        self.number += 1
        read = float(((logits > 0) == (bits_BK > 0.5)).float().mean())
        self.share += 0.05 * (read - self.share)
        psnr = float(-10 * error.detach().clamp_min(1e-12).log10())
        return Step(number=self.number, loss=float(loss.detach()), read=read, psnr=psnr)

    def _logits(self, marked: Tensor, plain: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits of marked pictures after attacks; and of what carries no fingerprint, or not at this place."""
        reader, side = self.fingerprint.reader, self.fingerprint.config.side
        present, absent = [], []
        for part in plain.chunk(4):
            shift = (0, 0)
            if isinstance(reader, TileReader):
                shift = (_below(reader.period, generator), _below(reader.period, generator))
            absent.append(reader(rounded(part), shift))
        for part in marked.chunk(2):
            attacked, shift = rounded(part), (0, 0)
            if self.share > _HARD:
                attacked, shift = random_attack(part, side, generator)
            present.append(reader(attacked, shift))
            if isinstance(reader, TileReader):
                down, right = 1 + _below(reader.period - 1, generator), _below(reader.period, generator)
                absent.append(reader(attacked, (shift[0] + down, shift[1] + right)))
        return torch.cat(present), torch.cat(absent)

    def _decibels(self) -> float:
        """The budget now: loose at first, since bits that nothing reads yet have no gradient."""
        risen = min(1.0, self.number / (0.4 * self.config.steps))
        return self.config.psnr_first + risen * (self.config.psnr - self.config.psnr_first)

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        if self.file is None:
            return
        tensors = {f"value|{name}": value.detach() for name, value in self.fingerprint.named_parameters()}
        for name, value in self.fingerprint.named_parameters():
            for key, tensor in self.optimizer.state.get(value, {}).items():
                tensors[f"{key}|{name}"] = tensor
        meta = {"number": str(self.number), "share": repr(self.share), "shapes": json.dumps(self.fingerprint.shapes)}
        ready = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        write_bytes(self.file, save(ready, metadata=meta))

    def _resume(self, file: Path) -> None:
        read = read_tensors(file, "state of a fingerprint")
        if json.loads(read.metadata.get("shapes", "{}")) != json.loads(json.dumps(self.fingerprint.shapes)):
            raise UserError(f"{file} is the state of another fingerprint; finish that one, or delete the file")
        self.number, self.share = int(read.metadata["number"]), float(read.metadata["share"])
        with torch.no_grad():
            for name, value in self.fingerprint.named_parameters():
                value.copy_(read.tensors[f"value|{name}"])
                state = {k: read.tensors[f"{k}|{name}"] for k in ("step", "exp_avg", "exp_avg_sq")
                         if f"{k}|{name}" in read.tensors}  # fmt: skip
                if state:
                    self.optimizer.state[value] = state


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


@torch.no_grad()
def measure(
    fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor, *, originals: Tensor | None = None,
    seed: int = 1, batch_size: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """Share of bits read after each attack, and what the fingerprint costs in picture quality.

    Args:
        fingerprint: trained.
        module: that holds the convolutions.
        decode: as in training.
        latents: (N, ...), of pictures that were not trained on.
        originals: the pictures (N, 3, H, W) in [0, 1], for the loss of PSNR.
        seed: of bits and crops.
        batch_size: at once.

    Returns:
        "read" by attack, "found" (share of pictures in which a fingerprint is seen), "found_in_plain", "all_bits"
        (share of pictures without a wrong bit) by attack, "psnr" of the change in dB, and
        with originals "psnr_plain" and "psnr_marked", means over pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    right: dict[str, list[Tensor]] = {name: [] for name in MEASURED}
    seen: dict[str, list[Tensor]] = {name: [] for name in MEASURED}
    wrong: list[Tensor] = []
    change, plain_db, marked_db = [], [], []
    for at in _slices(len(latents), batch_size):
        some = latents[at]
        bits_BK = torch.randint(2, (len(some), fingerprint.config.bits), generator=generator).float().to(some.device)
        plain = (decode(some) / 2 + 0.5).clamp(0, 1)
        with fingerprint.modulating(module, bits_BK):
            marked = (decode(some) / 2 + 0.5).clamp(0, 1)
        for name, attack in MEASURED.items():
            found = fingerprint.read(attack(marked, generator))
            right[name].append(((found.bits_BK > 0.5) == (bits_BK > 0.5)).float())
            seen[name].append((found.present_B > PRESENT).float())
        wrong.append((fingerprint.read(rounded(plain)).present_B > PRESENT).float())
        change.append(_psnr(marked, plain))
        if originals is not None:
            plain_db.append(_psnr(plain, originals[at]))
            marked_db.append(_psnr(marked, originals[at]))
    report: dict[str, Any] = {
        "n": len(latents), "read": {name: round(float(torch.cat(each).mean()), 4) for name, each in right.items()},
        "all_bits": {name: round(float(torch.cat(each).all(1).float().mean()), 4) for name, each in right.items()},
        "found": {name: round(float(torch.cat(each).mean()), 4) for name, each in seen.items()},
        "found_in_plain": round(float(torch.cat(wrong).mean()), 4),
        "psnr": round(float(torch.cat(change).mean()), 2),
    }  # fmt: skip
    if originals is not None:
        report["psnr_plain"] = round(float(torch.cat(plain_db).mean()), 2)
        report["psnr_marked"] = round(float(torch.cat(marked_db).mean()), 2)
    return report


def _psnr(given: Tensor, wanted: Tensor) -> Tensor:
    return -10 * (given - wanted).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(k, min(k + size, count)) for k in range(0, count, size))
