"""The training loop that stages share: resumable to the step, bf16 autocast over fp32 masters, EMA, Muon and AdamW.

Design choices
- A stage is one `nn.Module` whose forward takes a batch and returns named losses; the loop knows nothing else of it.
- Batch k depends on (seed, k) alone, and everything that changes is in one safetensors file written by rename: a run
  that was killed goes on as if it had not been.
- The schedule is warm-up, constant, linear decay over the last share of the budget; the budget is minutes of training,
  since that is what a lent GPU or a night on a laptop is measured in. A finished run can be given more minutes.
- Muon (Jordan et al. 2024) for hidden matrices, AdamW for the rest; with `muon: false` AdamW for all.
- accelerate moves and wraps the module, so that several devices need no other code.

This module does not know pictures, models or what a loss means.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from mm.core.files import write_bytes
from mm.training.optimizers import Muon, flatten_state, restore_state


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast to train. Rates are for `batch_size` samples a step and device."""

    minutes: float = 60.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    muon: bool = True
    muon_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay_share: float = 0.25
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 0
    save_minutes: float = 4.0
    look_minutes: float = 15.0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.batch_size < 1:
            raise ValueError(f"minutes {self.minutes} and batch_size {self.batch_size} must be positive")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema {self.ema} must lie in [0, 1)")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share {self.decay_share} must lie in [0, 1]")


def rate_factor(config: LoopConfig, step: int, seconds: float) -> float:
    """Share of the full learning rate at `step` (counted from the last warm-up), after `seconds` of training."""
    left = 1 - seconds / (60 * config.minutes)
    decay = 1.0 if config.decay_share == 0 else min(1.0, max(left, 0.0) / config.decay_share)
    return min(1.0, (step + 1) / config.warmup) * max(decay, 0.01)


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    ends: tuple[str, ...] = (
        "words",
        "mode_tokens",
        "latent_in",
        "velocity_out",
        "modulation",
        "modulation_out",
        "place",
        "readout",
    )
    ends += ("token_embedding", "positional_embedding", "proj", "text_projection")  # open_clip's names
    return parameter.ndim == 2 and not any(part in ends or part.endswith("_out") for part in name.split("."))


def optimizers(module: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices (if wanted) and AdamW for everything else.

    A module's `rate_shares` name, for some of its parts, the share of AdamW's learning rate that they learn with.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if config.muon and _is_hidden_matrix(n, p)]
    chosen = {id(p) for p in hidden}
    shares = getattr(module, "rate_shares", {})
    grouped: dict[float, list[nn.Parameter]] = {}
    for name, p in named:
        if id(p) not in chosen:
            grouped.setdefault(shares.get(name.split(".")[0], 1.0), []).append(p)
    rest = [{"params": group, "share": share} for share, group in grouped.items()]
    out: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    ]
    if hidden:
        out.append(Muon(hidden, config.muon_rate, weight_decay=config.weight_decay))
    return out


class Loop:
    """Trains one stage's module into a folder, where it also resumes; a fresh one may start from another's state."""

    def __init__(self, module: nn.Module, out: Path, config: LoopConfig, start_from: Path | None = None) -> None:
        self.config, self.out = config, out
        # A step learns one task, so some parts are not used in it.
        several = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(mixed_precision="bf16", kwargs_handlers=[several])
        self.optimizers = optimizers(module, config)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.module = self.accelerator.prepare(module)
        self.bare = self.accelerator.unwrap_model(self.module)
        self.average = {n: p.detach().clone() for n, p in self.bare.named_parameters()}
        self.step, self.seconds, self.samples = 0, 0.0, 0
        self.warm_from = 0
        self.state_file = out / "state.safetensors"
        out.mkdir(parents=True, exist_ok=True)
        if self.state_file.is_file():
            self._resume(self.state_file)
        elif start_from is not None:
            self._resume(start_from)

    def run(self, batches: Callable[[int], object], look: Callable[[Loop], None] | None = None) -> None:
        """Trains until the minutes are used up. `batches(step)` makes a batch; `look` is called now and then."""
        self.module.train()
        saved = looked = self.seconds
        trail: dict[str, float] = {}
        stop = _StopAsked()
        while self.seconds < 60 * self.config.minutes and not stop.asked:
            start = time.monotonic()
            for name, value in self._train_step(batches(self.step)).items():
                trail[name] = trail.get(name, value) + 0.02 * (value - trail.get(name, value))
            self.seconds += time.monotonic() - start
            if self.step % 50 == 0:
                self.log(**trail)
            if self.seconds - saved > 60 * self.config.save_minutes:
                self.save()
                saved = self.seconds
            if look and self.seconds - looked > 60 * self.config.look_minutes:
                looked = self.seconds
                self._look(look)
        self.save()
        if look:
            self._look(look)

    def _train_step(self, batch: object) -> dict[str, float]:
        factor = rate_factor(self.config, self.step - self.warm_from, self.seconds)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor * group.get("share", 1.0)
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
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        names, now = zip(*self.bare.named_parameters(), strict=True)
        torch._foreach_lerp_([self.average[n] for n in names], [p.detach() for p in now], 1 - keep)
        self.step += 1
        self.samples += self.config.batch_size * self.accelerator.num_processes
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _look(self, look: Callable[[Loop], None]) -> None:
        with self.averaged():
            look(self)

    def averaged(self) -> _Averaged:
        """A context in which the module holds its averaged weights."""
        return _Averaged(self)

    def log(self, **values: float) -> None:
        """One JSON line in `log.jsonl` and on the terminal."""
        if not self.accelerator.is_main_process:
            return
        line = {"step": self.step, "samples": self.samples, "seconds": round(self.seconds)}
        text = json.dumps(line | {k: round(x, 5) if isinstance(x, float) else x for k, x in values.items()})
        print(text, flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(text + "\n")

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.bare.state_dict().items():
            yield f"module.{name}", tensor
        for name, tensor in self.average.items():
            yield f"average.{name}", tensor
        for k, optimizer in enumerate(self._bare_optimizers()):
            yield from flatten_state(optimizer, f"optimizer{k}").items()

    def _bare_optimizers(self) -> list[torch.optim.Optimizer]:
        return [getattr(o, "optimizer", o) for o in self.optimizers]

    def save(self) -> None:
        """Writes everything a resume needs, by rename."""
        if self.accelerator.is_main_process:
            named = ("step", "seconds", "samples", "warm_from")
            counters = {name: str(getattr(self, name)) for name in named}
            tensors = {name: tensor.contiguous() for name, tensor in self._tensors()}
            write_bytes(self.state_file, save(tensors, metadata=counters))

    def _resume(self, state_file: Path) -> None:
        with safe_open(state_file, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            counters = file.metadata()
        module = {n.removeprefix("module."): t for n, t in tensors.items() if n.startswith("module.")}
        self.bare.load_state_dict(module, strict=False)
        for name in self.average:
            # Parts that joined the module since (a code head) start from their fresh weights.
            self.average[name].copy_(tensors.get(f"average.{name}", self.average[name]))
        self.step, self.samples = int(counters["step"]), int(counters["samples"])
        if set(module) == set(self.bare.state_dict()):
            for k, optimizer in enumerate(self._bare_optimizers()):
                restore_state(optimizer, f"optimizer{k}", tensors)
            self.warm_from = int(counters.get("warm_from", 0))
        else:
            self.warm_from = self.step  # the optimizers know nothing of the new parts
        self.seconds = float(counters["seconds"])


class _StopAsked:
    """SIGTERM lets the step in hand end and the state be written; outside the main thread nothing is caught."""

    def __init__(self) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


class _Averaged:
    """Swaps the averaged weights in, and the trained ones back."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def __enter__(self) -> None:
        self._swap()
        self.loop.module.eval()

    def __exit__(self, *_: object) -> None:
        self._swap()
        self.loop.module.train()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.loop.bare.named_parameters():
            mine = self.loop.average[name]
            kept = parameter.detach().clone()
            parameter.copy_(mine)
            mine.copy_(kept)
