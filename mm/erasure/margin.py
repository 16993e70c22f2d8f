"""Whether an erasure is larger than what rounding to 4 bits does to the same layer.

MANSU and QUAIL (arXiv 2601.15538) found edits of language models that are far smaller than a quantization step, and
vanish when the edited weights are rounded. A patch that is applied to a 4-bit model runs beside the weights and cannot
vanish that way; one that is baked into 16-bit weights before they are quantized can.

The functional margin of a layer is the root mean square of what the patch changes in the layer's outputs on the
target's tokens, over that of half a quantization step in every weight with independent signs. Above 1 the edit exceeds
the rounding.

Legend: N outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mm.adapters.entry import Entry
from mm.adapters.factors import WHOLE, whole_change
from mm.erasure.methods.protocol import Job

GROUP = 64  # inputs that share a scale
LEVELS = 7  # of symmetric 4-bit weights on either side of zero
_REMEDY = (
    "apply the patch to the quantized model, which keeps it, or raise strength or rank before baking it into weights "
    "that are quantized later"
)
_made: ContextVar[list[float] | None] = ContextVar("mm_margins", default=None)


@contextmanager
def one_warning() -> Iterator[None]:
    """Erasures that are made inside and stay below the rounding give one warning together, at the end, with a count."""
    made: list[float] = []
    token = _made.set(made)
    try:
        yield
    finally:
        _made.reset(token)
    below = [margin for margin in made if margin < 1]
    if len(made) == 1:
        _warn_below(made[0])
    elif below:
        warnings.warn(
            f"{len(below)} of {len(made)} erasures change their layers by less than half a 4-bit step (by "
            f"{min(below):.2f} to {max(below):.2f} of it): {_REMEDY}",
            stacklevel=3,
        )


def _warn_below(margin: float) -> None:
    """Warns of a margin below 1, or counts it where several erasures warn together."""
    if (made := _made.get()) is not None:
        made.append(margin)
    elif margin < 1:
        warnings.warn(f"the erasure changes its layers by {margin:.2f} of half a 4-bit step: {_REMEDY}", stacklevel=5)


def half_step(weight_ND: Tensor) -> Tensor:
    """Half a step (N, D) of symmetric 4-bit weights in groups of 64 inputs."""
    width = weight_ND.shape[1]
    padded = torch.nn.functional.pad(weight_ND, (0, -width % GROUP))
    largest_NG = padded.reshape(len(padded), -1, GROUP).abs().amax(2)
    return (largest_NG / (2 * LEVELS)).repeat_interleave(GROUP, 1)[:, :width]


def change_of(entry: Entry, weight_ND: Tensor) -> Tensor | None:
    """What an entry adds to a layer's weight, (N, D); None for entries of embeddings and biases."""
    t = {name: tensor.to(weight_ND.dtype) for name, tensor in entry.tensors.items() if tensor.is_floating_point()}
    if entry.kind == "lowrank":
        return entry.scale * (t["up"] @ t["down"])
    if entry.kind == "rotation":
        return entry.scale * (t["rotation"] @ weight_ND - weight_ND)
    return entry.scale * whole_change(entry, weight_ND) if entry.kind in WHOLE else None


def squares(change_ND: Tensor, weight_ND: Tensor, target_DD: Tensor) -> tuple[float, float]:
    """The mean squares of the outputs that a change and half a step of rounding make; the margin is their ratio's root.

    Args:
        change_ND: what the patch adds to the weight.
        weight_ND: the weight.
        target_DD: second moment of the target's tokens at the layer.
    """
    moved = ((change_ND @ target_DD) * change_ND).sum()
    rounded = (half_step(weight_ND).square() @ target_DD.diagonal()).sum()
    return float(moved.clamp_min(0)), float(rounded.clamp_min(1e-30))


def margins(job: Job, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The margins of a patch's layers for its report, with a warning where the patch as a whole is below 1.

    Returns:
        "margin": of all layers together, "margins": by path, "below_half_a_step": the share of changed weights whose
        change is smaller than half a step. Empty for a patch of other kinds of entries.
    """
    found: dict[str, tuple[float, float]] = {}
    small = total = 0
    for group in job.groups:
        target_DD = job.features[group[0]].moments.target_DD
        for path in group:
            if path not in entries or path not in job.weights:
                continue
            change = change_of(entries[path], job.weights[path])
            if change is not None:
                found[path] = squares(change, job.weights[path], target_DD)
                small += int((change.abs() < half_step(job.weights[path])).sum())
                total += change.numel()
    if not found:
        return {}
    each = {path: round((moved / rounded) ** 0.5, 3) for path, (moved, rounded) in found.items()}
    moved, rounded = (sum(pair[i] for pair in found.values()) for i in (0, 1))
    whole = round((moved / rounded) ** 0.5, 3)
    _warn_below(whole)
    return {"margin": whole, "margins": each, "below_half_a_step": round(small / max(1, total), 4)}


def rounded_patch(entries: Mapping[str, Entry], bits: int) -> dict[str, Entry]:
    """Entries whose floating-point tensors are rounded to `bits`, symmetric, in groups of 64 along the last dimension.

    What an erasure loses when its own file is kept at 8 or 4 bits.
    """
    return {
        path: Entry(
            kind=entry.kind, scale=entry.scale, scope=entry.scope,
            tensors={k: _rounded(t, bits) if t.is_floating_point() else t for k, t in entry.tensors.items()},
        )
        for path, entry in entries.items()
    }  # fmt: skip


def _rounded(tensor: Tensor, bits: int) -> Tensor:
    levels = 2 ** (bits - 1) - 1
    flat = tensor.float().reshape(-1, tensor.shape[-1])
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % GROUP)).reshape(len(flat), -1, GROUP)
    step = (padded.abs().amax(2, keepdim=True) / levels).clamp_min(1e-30)
    return ((padded / step).round() * step).reshape(len(flat), -1)[:, : flat.shape[1]].reshape(tensor.shape)
