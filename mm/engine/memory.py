"""How much memory a model takes, from its files' headers, before anything is loaded; and which offload that suggests.

Design choices
- Parameters are counted in safetensors headers, so an estimate costs milliseconds and no memory.
- 4 bits: weights of linear layers take 4.5 bits (a 16-bit scale a group of 64 adds .25, branch and smoothing as much);
  everything else keeps 16 bits. Which tensors are linear weights of the denoiser is judged by name and shape, so the
  figure is an estimate and is called one.
- Activations are not known before a picture's size is; a fifth of the weights, at least 512 MiB, is left for them.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mm.core.errors import UserError

Offload = Literal["none", "model", "group"]
GIB = 1 << 30
_HEADER_LIMIT = 100 << 20  # bytes, safetensors' own limit
_DENOISERS = ("transformer", "unet", "trunk", "prior", "model")
_BITS_4 = 4.5 / 8  # bytes a weight


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

    Raises:
        UserError: where the folder has no safetensors files, or one that is damaged.
    """
    stored, sixteen, four, parts = 0, 0, 0.0, {}
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors files; pickled weights are not read")
    for file in _without_variants(files):
        component = file.relative_to(folder).parts[0]
        for name, (shape, size) in header(file).items():
            count = 1
            for side in shape:
                count *= side
            stored += size
            bytes16 = size if name.endswith((".qweight", ".weight_scales")) else 2 * count
            sixteen += bytes16
            parts[component] = parts.get(component, 0) + bytes16
            low = component in _DENOISERS and len(shape) == 2 and name.endswith(".weight") and min(shape) >= 64
            four += count * _BITS_4 if low else bytes16
    return Estimate(stored=stored, sixteen=sixteen, four=int(four), largest=max(parts.values()))


def _without_variants(files: list[Path]) -> list[Path]:
    """Of several variants of a file (`model.fp16.safetensors` beside `model.safetensors`), the plain one."""
    plain = {(f.parent, f.name) for f in files if f.name.count(".") == 1}
    return [
        f for f in files if f.name.count(".") == 1 or (f.parent, f"{f.name.split('.')[0]}.safetensors") not in plain
    ]


def header(file: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of each tensor of a safetensors file."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(_HEADER_LIMIT, file.stat().st_size):
                raise UserError(f"{file} is no safetensors file: its header claims {length} bytes")
            entries = json.loads(opened.read(length))
        return {
            name: (tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is no safetensors file ({type(error).__name__}: {error})") from error


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
    room = free - max(GIB // 2, needed // 5)
    sizes = f"{needed / GIB:.1f} GiB of weights, {free / GIB:.1f} GiB free"
    if needed <= room:
        return "none", f"everything fits on the device ({sizes})"
    if largest <= room:
        return (
            "model",
            f"one component at a time fits on the device ({sizes}, the largest part {largest / GIB:.1f} GiB)",
        )
    return "group", f"no component fits on the device as a whole ({sizes}, the largest part {largest / GIB:.1f} GiB)"
