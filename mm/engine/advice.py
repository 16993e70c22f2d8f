"""What a model needs and how `mm.load` would load it on this machine, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mm.core import devices
from mm.core.errors import UserError
from mm.core.part_files import check_weights_there, packed_parts
from mm.core.paths import resolve_model
from mm.engine import memory
from mm.engine.outline import capabilities_at
from mm.families.folders import family_at
from mm.families.loading import packed_line

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Of one model on this machine; sizes in bytes.

    Attributes:
        model: its name.
        family: of the model; empty for an unknown one.
        tasks: what it can do.
        stored: of its weights in their files.
        sixteen: at 16 bits.
        four: with 4 bits in the denoiser's linear layers.
        loaded: in the type that it would be loaded in.
        largest: the largest component in that type.
        free: on the device.
        device: it would be loaded on.
        dtype: it would be loaded in.
        dtype_why: the reason.
        offload: that would be chosen.
        offload_why: the reason.
        fits: whether the weights fit.
        packed: the parts that another library has quantized, with its name.
    """

    model: str
    family: str
    tasks: tuple[str, ...]
    stored: int
    sixteen: int
    four: int
    loaded: int
    largest: int
    free: int
    device: str
    dtype: str
    dtype_why: str
    offload: str
    offload_why: str
    fits: bool
    packed: dict[str, str]

    def lines(self) -> Iterator[str]:
        """The advice for a reader."""
        yield f"model     {self.model}: family {self.family or 'unknown'}"
        yield f"tasks     {', '.join(task.replace('_', ' ') for task in self.tasks) or 'not known'}"
        yield f"files     {_size(self.stored)} of weights"
        yield f"16 bits   about {_size(self.sixteen)}"
        if not self.packed:
            yield f"4 bits    about {_size(self.four)}, the denoiser's linear layers at 4 bits (--bits 4)"
        yield f"type      {self.dtype}: {self.dtype_why}"
        yield f"memory    {_size(self.loaded)} in {self.dtype} on {self.device}, {_size(self.free)} free"
        yield f"offload   {self.offload}: {self.offload_why}"
        if self.packed:
            yield f"note      {packed_line(self.packed)}: only with that library can it be loaded"
        if not self.fits:
            small = self.four < 0.8 * self.free and not self.packed
            smaller = "--bits 4 makes it fit" if small else "take a machine with more memory"
            yield f"note      the weights do not fit into the memory that is free; {smaller}"


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.1f} MiB"


def advice(model: str | Path) -> Advice:
    """What a model needs, by its configs and the headers of its safetensors files.

    Args:
        model: an embedded name, a folder, or a hub name whose files are in the cache.

    Raises:
        UserError: where there is no such model here, or its files are damaged.
    """
    folder = _folder(model)
    check_weights_there(folder)
    family, choice = family_at(folder), devices.choose()
    estimate, stored = memory.estimate(folder), memory.stored_type(folder)
    wide, why = _type(stored, family is not None and family.dtype == "float32", choice)
    factor = 2 if wide == "float32" else 1
    free = _free(choice.device)
    needed, largest = factor * estimate.sixteen, factor * estimate.largest
    if choice.device == "cpu":
        offload, reason = "none", "the device is the CPU, where all weights are already"
    else:
        offload, reason = memory.choose_offload(needed, largest, free)
    can = capabilities_at(folder, str(model))
    return Advice(
        model=str(model), family=family.name if family else "", tasks=can.tasks if can else (),
        stored=estimate.stored, sixteen=estimate.sixteen, four=estimate.four, loaded=needed, largest=largest, free=free,
        device=choice.device, dtype=wide, dtype_why=why, offload=offload, offload_why=reason,
        fits=needed <= (free if choice.device == "cpu" else memory.free_memory() + free),
        packed=packed_parts(folder),
    )  # fmt: skip


def _folder(model: str | Path) -> Path:
    where = resolve_model(model)
    if isinstance(where, Path):
        return where
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, local_files_only=True))
    except Exception as error:
        raise UserError(f"{where} is not in the cache; download it, or give a folder") from error


def _type(stored: str, always_wide: bool, choice: devices.Choice) -> tuple[str, str]:
    """The type that a model is loaded in, and why."""
    import torch

    if always_wide:
        return "float32", "the family is small enough to compute in float32"
    kind = devices.compute_type({"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32), choice)
    name = str(kind).removeprefix("torch.")
    if stored == "F32":
        return name, "the files are in float32; --dtype bfloat16 halves the memory"
    return name, f"the files are in {stored}; {choice.reason}"


def _free(device: str) -> int:
    if not device.startswith("cuda"):
        return memory.free_memory()
    import torch

    return int(torch.cuda.mem_get_info()[0])
