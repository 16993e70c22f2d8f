"""Memory and time of a run, measured on one step before it starts.

Design choices
- One step is run and thrown away: its activations are counted as autograd keeps them, and its time is that of a step.
  On a GPU its peak is measured.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.customization.training import Training
from mm.layers.checkpointing import Inputs


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs.

    Attributes:
        seconds: of all its steps and previews, without sample pictures.
        memory: bytes beside the model: activations, trained values, gradients, and the optimizer's state.
        free: bytes that the device has free now; None where it is not known.
        trained: trained values.
    """

    seconds: float
    memory: int
    free: int | None
    trained: int

    def __str__(self) -> str:
        free = "" if self.free is None else f" of {self.free / 2**20:,.0f} MiB free"
        return (
            f"{self.trained:,} trained values, about {self.memory / 2**20:,.0f} MiB beside the model{free}, "
            f"about {self.seconds:,.0f} s"
        )


def estimate(training: Training, inputs: Inputs) -> Estimate:
    """Measures one step; nothing is changed. Of blocks that are computed again, a CPU's estimate counts the inputs.

    Args:
        training: the run.
        inputs: what blocks that are computed again keep.

    Raises:
        UserError: where the step does not fit into memory.
    """
    passed, activations = _one_step(training, inputs)
    values = sum(p.numel() for p in training.parameters.values())
    config = training.config
    more = config.strangers if training.strangers is not None and training.strangers.prompts else 0
    at_once = (config.preserve_batch + more) if training.prompts else more
    held = 1.5 * at_once / config.batch_size / config.preserve_every
    each = passed * (1.05 + (held if config.preserve else 0.0))
    previews = config.steps // config.preview_every + 1
    left = config.steps - training.progress.step
    return Estimate(
        seconds=each * left + previews * passed, memory=activations + 16 * values, trained=values,
        free=_free(training.objective.device),
    )  # fmt: skip


def _one_step(training: Training, inputs: Inputs) -> tuple[float, int]:
    """Seconds of a step's loss and gradient, and the bytes that it needs beside the model."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = {
        p.untyped_storage().data_ptr()
        for part in training.objective.modules().values()
        for p in (*part.parameters(), *part.buffers())
    }
    step, device = training.batches.step(0), training.objective.device
    training.encode_captions(step)
    inputs.clear()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    try:
        with training.goal.acting(training.progress.step):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = training.loss(step)
            loss.backward()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"one step of {counted(len(step.chosen), 'picture')} of {training.objective.side} "
            "pixels does not fit into the device's memory; give checkpointing=True, a smaller batch_size or size, or a "
            "4-bit model"
        ) from error
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    passed = time.perf_counter() - started
    for value in training.parameters.values():
        value.grad = None
    if device.type == "cuda":
        return passed, torch.cuda.max_memory_allocated(device) - before
    return passed, inputs.bytes + sum(size for place, size in seen.items() if place not in model)


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
