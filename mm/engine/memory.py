"""How much memory a model takes, from its files' headers, before anything is loaded; and which offload that suggests.

Design choices
- Parameters are counted in safetensors headers, so an estimate costs milliseconds and no memory.
- 4 bits: weights of linear layers take 4.5 bits (a 16-bit scale a group of 64 adds .25, branch and smoothing as much);
  everything else keeps 16 bits. Which tensors are linear weights of the denoiser is judged by name and shape, so the
  figure is an estimate and is called one.
- Activations are not known before a picture's size is; a fifth of the weights, at least 512 MiB, is left for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mm.core.errors import UserError
from mm.core.safe_tensors import TensorHeader, read_header

Offload = Literal["none", "model", "group"]
GIB = 1 << 30
_DENOISERS = ("transformer", "unet", "trunk", "prior", "model")
_BITS_4 = 4.5 / 8  # bytes a weight
_SMALLEST = 64  # inputs and outputs of a layer that is quantized


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of a model's weights: `stored` in its files, at 16 bits, at 4 bits; and of its largest component."""

    stored: int
    sixteen: int
    four: int
    largest: int

    def __str__(self) -> str:
        return f"about {self.sixteen / GIB:.2f} GiB at 16 bits, {self.four / GIB:.2f} GiB with the denoiser at 4 bits"


def estimate(folder: Path) -> Estimate:
    """Weights of a model folder by its safetensors headers.

    Args:
        folder: in diffusers' or transformers' layout.

    Raises:
        UserError: where the folder has no safetensors files, or one that is damaged.
    """
    stored, sixteen, four, parts = 0, 0, 0.0, dict[str, int]()
    for component, name, tensor in _tensors(folder):
        stored += tensor.end - tensor.start
        packed = name.endswith((".qweight", ".weight_scales"))
        bytes16 = tensor.end - tensor.start if packed else 2 * tensor.numel
        sixteen += bytes16
        parts[component] = parts.get(component, 0) + bytes16
        linear = len(tensor.shape) == 2 and name.endswith(".weight") and min(tensor.shape) >= _SMALLEST
        four += tensor.numel * _BITS_4 if component in _DENOISERS and linear else bytes16
    return Estimate(stored=stored, sixteen=sixteen, four=int(four), largest=max(parts.values()))


def stored_type(folder: Path) -> str:
    """The type of most of a model's numbers in its files, by safetensors' name ("BF16", "F16", "F32")."""
    counts: dict[str, int] = {}
    for _, _, tensor in _tensors(folder):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    floats = {kind: count for kind, count in counts.items() if kind in ("BF16", "F16", "F32")}
    return max(floats, key=lambda kind: floats[kind]) if floats else "F32"


def _tensors(folder: Path) -> Iterator[tuple[str, str, TensorHeader]]:
    """Component, name and header of every tensor; of several variants of a file, those of the plain one."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors files; pickled weights are not read")
    plain = {(f.parent, f.name) for f in files if f.name.count(".") == 1}
    for file in files:
        if file.name.count(".") > 1 and (file.parent, f"{file.name.split('.')[0]}.safetensors") in plain:
            continue
        for name, tensor in read_header(file).tensors.items():
            yield file.relative_to(folder).parts[0], name, tensor


def free_memory() -> int:
    """Bytes that a new process may take on the CPU: what the kernel calls available, bounded by the control group."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
    except OSError:
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        found.append(limit - used)
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else 8 * GIB


def choose_offload(needed: int, largest: int, free: int) -> tuple[Offload, str]:
    """The offload for a GPU with `free` bytes, and why.

    Args:
        needed: bytes of all weights in the type they are loaded in.
        largest: bytes of the largest component.
        free: bytes that are free on the device.
    """
    usable = free - max(GIB // 2, needed // 5)
    sizes = f"{needed / GIB:.1f} GiB of weights, {free / GIB:.1f} GiB free"
    if needed <= usable:
        return "none", f"everything fits on the device ({sizes})"
    if largest <= usable:
        return (
            "model",
            f"one component at a time fits on the device ({sizes}, the largest part {largest / GIB:.1f} GiB)",
        )
    return "group", f"no component fits on the device as a whole ({sizes}, the largest part {largest / GIB:.1f} GiB)"
