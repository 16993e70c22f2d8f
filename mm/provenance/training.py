"""Trains a fingerprint on a decoder that stays as it is: bits that can be read, in pictures that hardly change.

Design choices
- The loss is cross-entropy of the bits, plus that of the place among all places and none, plus what picture quality
  loses, in dB. The weight of the last is a Lagrange multiplier: it rises while the loss of quality is above its
  budget, and falls while it is below. The budget begins loose, since bits that nothing reads yet have no gradient.
- Where the original pictures are known, the loss of quality is that of PSNR against them, a mean over pictures;
  otherwise it is counted from a PSNR against the plain decoder's pictures.
- Once bits can be read at all, three quarters of the pictures are attacked, more and more strongly.
- The decoder's plain pictures do not change, so that they are decoded once. Decoder and reader run in bfloat16 where
  the device has it; plain pictures too, so that rounding does not distinguish marked pictures.
- The state lies in one file, written by rename. Step k depends on (seed, k) and the state alone. Nothing waits for the
  device between two logged steps.

Legend: B pictures, K bits, N latents, P places.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.core.devices import lacks_bfloat16
from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.safe_tensors import read_tensors, tensor_bytes
from mm.provenance.fingerprint import Fingerprint
from mm.provenance.losses import quality_lost, reading_losses

_HARD = 0.85  # share of bits read from which pictures are attacked
_HARDER = 600  # steps in which attacks reach their full strength
_SHARE = 0.02  # of a step in the running means
_PRESENCE = 0.3  # weight of the place
_PATIENCE = 0.01  # by how much the logarithm of the multiplier changes a step and dB
STATE = "fingerprint-state.safetensors"
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class FingerprintTraining:
    """Settings of a run.

    Attributes:
        steps: at most so many; the learning rates fall over the second half.
        minutes: of training, earlier calls included, at the end of which the rates have fallen too; None: no limit.
        batch_size: B.
        learning_rate: of the reader.
        change_rate: of what the bits change.
        decibels: what picture quality may lose.
        decibels_first: at the first step; the budget falls to `decibels` over two fifths of the run.
        psnr: against the plain decoder's picture at which `decibels` are lost, where the originals are not given.
        spread: of the starting values, which are then scaled to the first budget.
        seed: of everything drawn.
        save_every: steps between two saves of the state.
        log_every: steps between two that are measured.
        autocast: to bfloat16, where the device has arithmetic for it.
    """

    steps: int = 3000
    minutes: float | None = None
    batch_size: int = 16
    learning_rate: float = 2e-3
    change_rate: float = 5e-3
    decibels: float = 0.9
    decibels_first: float = 4.0
    psnr: float = 35.5
    spread: float = 0.1
    seed: int = 0
    save_every: int = 500
    log_every: int = 20
    autocast: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("learning_rate", "change_rate", "psnr", "decibels", "decibels_first", "spread"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes is {self.minutes}; give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step has measured.

    Attributes:
        number: of the step.
        loss: of all parts.
        read: running mean of the share of bits read, after attacks.
        decibels: running mean of what picture quality loses.
        budget: what it may lose at this step.
        strength: of attacks, 0 to 1.
        seconds: of training so far.
    """

    number: int
    loss: float
    read: float
    decibels: float
    budget: float
    strength: float
    seconds: float


def train_fingerprint(
    fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor, config: FingerprintTraining, *,
    originals: Tensor | None = None, work: str | Path | None = None, seconds: float | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:  # fmt: skip
    """Trains in place, on the device of the latents.

    Args:
        fingerprint: as `fingerprint_of` made it, on the same device.
        module: that holds the convolutions; its weights stay.
        decode: latents (B, ...) to pictures in [-1, 1] with gradients, by the module.
        latents: (N, ...), of pictures such as the model draws.
        config: see `FingerprintTraining`.
        originals: the pictures (N, 3, H, W) that the latents stand for, as bytes; None compares with the plain
            decoder's.
        work: folder of the state; None keeps none.
        seconds: of this call at most.
        on_step: called after each measured step.

    Returns:
        The measured steps of this call.
    """
    run = _Run(fingerprint, module, decode, latents, config, originals, work)
    started, done, before = time.monotonic(), [], run.spent
    while not run.finished and (seconds is None or time.monotonic() - started < seconds):
        run.step()
        run.spent = before + time.monotonic() - started
        if run.number % config.log_every == 0 or run.finished:
            done.append(run.measured())
            on_step(done[-1])
        if run.number % config.save_every == 0:
            run.save()
    run.save()
    return done


class _Run:
    def __init__(
        self, fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor,
        config: FingerprintTraining, originals: Tensor | None, work: str | Path | None,
    ) -> None:  # fmt: skip
        self.fingerprint, self.module, self.decode = fingerprint, module, decode
        self.latents, self.config, self.originals = latents, config, originals
        self.number, self.spent, self.strength = 0, 0.0, 0.0
        # On the device: running means of bits read and dB lost, the last loss, and the multiplier's logarithm.
        self.now = torch.tensor([0.5, config.decibels_first, 0.0, math.log(0.02)], device=latents.device)
        self.changes = [*fingerprint.scale.values(), *fingerprint.shift.values()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(fingerprint.reader.parameters()), "lr": config.learning_rate},
                {"params": self.changes, "lr": config.change_rate},
            ],
            betas=(0.9, 0.99), weight_decay=1e-4,
        )  # fmt: skip
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        kind = latents.device.type
        self.autocast = config.autocast and (kind != "cpu" or lacks_bfloat16() is None)
        self.plain = self._plain_pictures()
        self.file = None if work is None else Path(work) / STATE
        if self.file is not None and self.file.is_file():
            self._resume(self.file)
        else:
            self._start()

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        passed = 0.0 if self.config.minutes is None else self.spent / (60 * self.config.minutes)
        return max(self.number / self.config.steps, passed)

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    @property
    def budget(self) -> float:
        """What picture quality may lose now, in dB."""
        first, last = self.config.decibels_first, self.config.decibels
        return first + min(1.0, self.progress / 0.4) * (last - first)

    @torch.no_grad()
    def _start(self) -> None:
        """Starting values of what the bits change, scaled to the first budget."""
        self.fingerprint.start(self.config.spread, torch.Generator().manual_seed(self.config.seed))
        for number in range(8):
            generator = torch.Generator().manual_seed(self.config.seed + 7919 * (number + 1))
            latents, plain, originals, bits = self._batch(generator)
            marked = self._marked(latents, bits)
            # The squared change grows with the square of the values, and so does what is lost, while it is small.
            lost = max(float(self._quality_lost(plain, marked, originals)), 1e-4)
            gain = ((10 ** (self.config.decibels_first / 10) - 1) / (10 ** (lost / 10) - 1)) ** 0.5
            for value in self.changes:
                value.mul_(min(max(gain, 0.1), 10.0))

    @torch.no_grad()
    def _plain_pictures(self) -> Tensor:
        """What the decoder makes of the latents without a fingerprint, as bytes (N, 3, H, W)."""
        parts = []
        for latents in self.latents.split(self.config.batch_size):
            with self._precision():
                pictures = self.decode(latents.float()).float() / 2 + 0.5
            parts.append((pictures.clamp(0, 1) * 255).round().to(torch.uint8))
        return torch.cat(parts)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.latents.device.type, torch.bfloat16, enabled=self.autocast)

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Latents, the decoder's plain pictures, originals and bits of a step."""
        size, device = self.config.batch_size, self.latents.device
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        bits_BK = torch.randint(2, (size, self.fingerprint.config.bits), generator=generator).float()
        originals = None
        if self.originals is not None:
            originals = self.originals[chosen.to(self.originals.device)].to(device).float() / 255
        chosen = chosen.to(device)
        return self.latents[chosen].float(), self.plain[chosen].float() / 255, originals, bits_BK.to(device)

    def _marked(self, latents: Tensor, bits_BK: Tensor) -> Tensor:
        with self._precision(), self.fingerprint.modulating(self.module, bits_BK):
            return self.decode(latents).float() / 2 + 0.5

    def _quality_lost(self, plain: Tensor, marked: Tensor, originals: Tensor | None) -> Tensor:
        return quality_lost(plain, marked, originals, psnr=self.config.psnr, decibels=self.config.decibels)

    def step(self) -> None:
        """One update."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.number)
        latents, plain, originals, bits_BK = self._batch(generator)
        left = 1 - self.progress
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, (self.number + 1) / 20, 0.02 + 2 * left)
        marked = self._marked(latents, bits_BK)
        lost = self._quality_lost(plain, marked, originals)
        with self._precision():
            logits_BK, place, none = reading_losses(self.fingerprint, marked, plain, generator, self.strength)
        weight = self.now[3].exp()
        loss = F.binary_cross_entropy_with_logits(logits_BK, bits_BK) + _PRESENCE * (place + none) + weight * lost
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.fingerprint.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            read = ((logits_BK > 0) == (bits_BK > 0.5)).float().mean()
            self.now[:2] += _SHARE * (torch.stack([read, lost]) - self.now[:2])
            self.now[2] = loss
            self.now[3] = (self.now[3] + _PATIENCE * (lost - self.budget).clamp(-1, 1)).clamp(-9, 3)
        self.number += 1

    def measured(self) -> Step:
        """What the running means say; attacks become stronger where bits are read."""
        read, lost, loss, _ = self.now.tolist()
        if read > _HARD:
            self.strength = min(1.0, self.strength + self.config.log_every / _HARDER)
        return Step(
            number=self.number, loss=loss, read=read, decibels=lost, budget=self.budget, strength=self.strength,
            seconds=self.spent,
        )  # fmt: skip

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        if self.file is None:
            return
        tensors = {f"value|{name}": value.detach() for name, value in self.fingerprint.named_parameters()}
        for name, value in self.fingerprint.named_parameters():
            for key, tensor in self.optimizer.state.get(value, {}).items():
                tensors[f"{key}|{name}"] = tensor
        tensors["now"] = self.now
        meta = {
            "number": str(self.number), "spent": repr(self.spent), "strength": repr(self.strength),
            "shapes": json.dumps(self.fingerprint.shapes),
        }  # fmt: skip
        write_bytes(self.file, tensor_bytes(tensors, meta))

    def _resume(self, file: Path) -> None:
        read = read_tensors(file, "state of a fingerprint")
        if json.loads(read.metadata.get("shapes", "{}")) != json.loads(json.dumps(self.fingerprint.shapes)):
            raise UserError(f"{file} is the state of another fingerprint; finish that one, or delete the file")
        self.number, self.spent = int(read.metadata["number"]), float(read.metadata["spent"])
        self.strength = float(read.metadata["strength"])
        self.now.copy_(read.tensors["now"])
        with torch.no_grad():
            for name, value in self.fingerprint.named_parameters():
                value.copy_(read.tensors[f"value|{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                state = {k: read.tensors[f"{k}|{name}"] for k in keys if f"{k}|{name}" in read.tensors}
                state = {k: tensor if k == "step" else tensor.to(value.device) for k, tensor in state.items()}
                if state:
                    self.optimizer.state[value] = state
