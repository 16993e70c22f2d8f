"""The trainer of every stage: resumable to the step, bf16 autocast over fp32 weights, averaged weights, Muon and AdamW.

Design choices
- A stage gives a module whose forward takes a batch and returns named losses, a function from step to batch, and an
  evaluation (`mm.training.stage`).
- Batch k depends on (seed, k) alone, and all state is in one safetensors file written by rename: a run that was killed
  continues as if it had not been.
- The budget is minutes of training, and the learning rate follows the share of it that has passed: constant, then
  linear decay, or a cosine. A finished run can be given more minutes.
- Muon (Jordan et al. 2024) for hidden matrices, AdamW for the rest; with `muon: false` AdamW for all.
- accelerate moves and wraps the module, so that several devices need no other code.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from mm.core.run_files import read_state, write_state
from mm.training.averages import WeightAverage
from mm.training.optimizers import flatten_state, muon_and_adamw, restore_state
from mm.training.processes import agreed, in_first_process, processes
from mm.training.workers import batches_from

Batches = Callable[[int, int], Any]  # (step, process) -> batch
Evaluate = Callable[["Trainer"], "dict[str, Any] | None"]
_LOG_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and how fast to train.

    Attributes:
        minutes: Budget of training, without evaluations.
        batch_size: Samples a step and device.
        learning_rate: AdamW's.
        muon: Whether hidden matrices are trained by Muon.
        muon_rate: Muon's learning rate.
        weight_decay: Decoupled, of both optimizers.
        warmup: Steps in which the rate rises linearly.
        schedule: "linear": constant, then linear decay over `decay_share`; "cosine": over the whole budget.
        decay_share: Share of the budget.
        floor: The lowest share of the learning rate.
        ema: Largest decay of the averaged weights.
        clip: Largest norm of the gradient.
        seed: Of batches.
        save_minutes: Between two saves of the state.
        preview_minutes: Between two evaluations.
        workers: Processes that make batches ahead of time; 0 makes them in the training process.
    """

    minutes: float = 60.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    muon: bool = True
    muon_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    schedule: Literal["linear", "cosine"] = "linear"
    decay_share: float = 0.25
    floor: float = 0.01
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 0
    save_minutes: float = 4.0
    preview_minutes: float = 15.0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.batch_size < 1:
            raise ValueError(f"minutes {self.minutes} and batch_size {self.batch_size} must be positive")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers} must not be negative")
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"schedule {self.schedule!r} is none of linear, cosine")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema} must lie in [0, 1)")
        for name in ("decay_share", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1]")


def rate_factor(config: TrainerConfig, step: int, seconds: float) -> float:
    """Share of the full learning rate at `step` (counted from the last warm-up), after `seconds` of training."""
    warm = min(1.0, (step + 1) / config.warmup)
    passed = min(1.0, seconds / (60 * config.minutes))
    if config.schedule == "cosine":
        return warm * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * passed)))
    decay = 1.0 if config.decay_share == 0 else min(1.0, (1 - passed) / config.decay_share)
    return warm * max(decay, config.floor)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch (a tensor, or a dataclass of tensors and dataclasses) on a device."""
    if torch.is_tensor(batch):
        return batch.to(device)
    if is_dataclass(batch) and not isinstance(batch, type):
        return type(batch)(**{f.name: moved(getattr(batch, f.name), device) for f in fields(batch)})
    return batch


class Trainer:
    """Trains one stage's module into a folder, where it also resumes.

    Args:
        module: Its forward returns named losses; names with a leading underscore are logged and not trained on.
        out: Folder of state, log and previews.
        config: How long and how fast.
        optimizers: The module's optimizers, where they are not the usual Muon and AdamW.
        start_from: State of another stage, for a run that begins.
    """

    def __init__(
        self,
        module: nn.Module,
        out: Path,
        config: TrainerConfig,
        *,
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
        start_from: Path | None = None,
    ) -> None:
        self.config, self.out = config, out
        # A step trains one task, so that some parts are not used in it.
        several = DistributedDataParallelKwargs(find_unused_parameters=True)
        processes()  # joins them, before accelerate would with a shorter wait
        self.accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[several])
        self.optimizers = (
            list(optimizers)
            if optimizers is not None
            else muon_and_adamw(
                module,
                learning_rate=config.learning_rate,
                muon_rate=config.muon_rate if config.muon else None,
                weight_decay=config.weight_decay,
            )
        )
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.module = self.accelerator.prepare(module)
        self.bare = self.accelerator.unwrap_model(self.module)
        self.average = WeightAverage(self.bare, config.ema)
        self.step, self.seconds, self.samples = 0, 0.0, 0
        self.warm_from = 0
        self.state_file = out / "state.safetensors"
        out.mkdir(parents=True, exist_ok=True)
        if self.state_file.is_file():
            self._resume(self.state_file)
        elif start_from is not None:
            self._resume(start_from)

    def run(self, batches: Batches, evaluate: Evaluate | None = None) -> None:
        """Trains until the minutes are used up, or SIGTERM.

        Args:
            batches: Makes the batch of a step for a process.
            evaluate: Called now and then and at the end, while the module holds averaged weights, in the first process
                alone; what it returns is logged.
        """
        self.module.train()
        saved = evaluated = self.seconds
        smoothed: dict[str, float] = {}
        stop, stopped = _Terminated(), False
        made = batches_from(batches, self.step, process=self.accelerator.process_index, workers=self.config.workers)
        with closing(made):
            while self.seconds < 60 * self.config.minutes and not stopped:
                start = time.monotonic()
                batch = moved(next(made), self.accelerator.device)
                for name, value in self.train_step(batch).items():
                    smoothed[name] = smoothed.get(name, value) + 0.02 * (value - smoothed.get(name, value))
                passed, stopped = agreed(time.monotonic() - start, stop.requested)
                self.seconds += passed
                if self.step % _LOG_STEPS == 0:
                    self.log(**smoothed)
                if self.seconds - saved > 60 * self.config.save_minutes:
                    self.save()
                    saved = self.seconds
                if evaluate and self.seconds - evaluated > 60 * self.config.preview_minutes:
                    evaluated = self.seconds
                    self._evaluate(evaluate)
        in_first_process(self.save)
        if evaluate:
            self._evaluate(evaluate)

    def train_step(self, batch: Any) -> dict[str, float]:
        """One update; returns the losses.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        factor = rate_factor(self.config, self.step - self.warm_from, self.seconds)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        with self.accelerator.autocast():
            losses: dict[str, torch.Tensor] = self.module(batch)
        total = torch.stack([loss for name, loss in losses.items() if not name.startswith("_")]).sum()
        if not math.isfinite(value := float(total.detach())):
            raise FloatingPointError(f"the loss is {value} at step {self.step}; resume with a lower learning rate")
        self.accelerator.backward(total)
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update(self.step)
        self.step += 1
        self.samples += self.config.batch_size * self.accelerator.num_processes
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _evaluate(self, evaluate: Evaluate) -> None:
        in_first_process(lambda: self._evaluate_here(evaluate))

    def _evaluate_here(self, evaluate: Evaluate) -> None:
        with self.averaged():
            scores = evaluate(self)
        if scores:
            self.log(**scores)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the module holds its averaged weights, in eval mode."""
        self.average.swap()
        self.module.eval()
        try:
            yield
        finally:
            self.average.swap()
            self.module.train()

    def log(self, **values: Any) -> None:
        """Writes one JSON line to `log.jsonl` and to the terminal."""
        if not self.accelerator.is_main_process:
            return
        line = {"step": self.step, "samples": self.samples, "seconds": round(self.seconds)}
        text = json.dumps(line | {k: round(x, 5) if isinstance(x, float) else x for k, x in values.items()})
        print(text, flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(text + "\n")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors of the state by name."""
        for name, tensor in self.bare.state_dict().items():
            yield f"module.{name}", tensor
        for name, tensor in self.average.tensors.items():
            yield f"average.{name}", tensor
        for k, optimizer in enumerate(self._bare_optimizers()):
            yield from flatten_state(optimizer, f"optimizer{k}").items()

    def _bare_optimizers(self) -> list[torch.optim.Optimizer]:
        return [getattr(o, "optimizer", o) for o in self.optimizers]

    def save(self) -> None:
        """Writes everything that a resume needs, whole or not at all. A state that is there is replaced."""
        if self.accelerator.is_main_process:
            named = ("step", "seconds", "samples", "warm_from")
            counters = {name: str(getattr(self, name)) for name in named}
            write_state(self.state_file, dict(self.tensors()), counters)

    def _resume(self, state_file: Path) -> None:
        again = f"delete {state_file}, and the stage begins again, or put a copy of it there"
        state = read_state(state_file, "state of a stage", again, finite=False)
        with state.taking():
            self._take(state.tensors, state.metadata)

    def _take(self, tensors: dict[str, torch.Tensor], counters: Mapping[str, str]) -> None:
        """Takes in a state's tensors and counters; parts of the module that are new to the stage stay fresh."""
        module = {n.removeprefix("module."): t for n, t in tensors.items() if n.startswith("module.")}
        self.bare.load_state_dict(module, strict=False)
        self.average.load({n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")})
        self.step, self.samples = int(counters["step"]), int(counters["samples"])
        if set(module) == set(self.bare.state_dict()):
            for k, optimizer in enumerate(self._bare_optimizers()):
                restore_state(optimizer, f"optimizer{k}", tensors)
            self.warm_from = int(counters.get("warm_from", 0))
        else:
            self.warm_from = self.step  # the optimizers have no state of the new parts
        self.seconds = float(counters["seconds"])


class _Terminated:
    """On SIGTERM the current step ends and the state is written; outside of the main thread nothing is handled."""

    def __init__(self) -> None:
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True
