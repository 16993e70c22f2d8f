"""`mm.load`: any model as an `Engine`.

Design choices
- Names are resolved in one order: embedded model, folder, single file, name on the Hugging Face hub.
- One pipeline is loaded. Others of the family (image-to-image, inpainting, editing, reading) share its modules: through
  diffusers' `from_pipe`, or for families with classes of their own by loading only the components that are missing.
- Device, type and offload are chosen from what the machine has, and the choice is said in `Engine.notes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm.core import devices
from mm.core.checks import check_path
from mm.core.errors import UserError
from mm.core.paths import expanded, resolve_model
from mm.core.threads import release_team
from mm.engine import memory
from mm.engine.attaching import Adapter, attach_all, listed
from mm.engine.engine import Engine
from mm.engine.facts import capabilities_of
from mm.engine.opening import quantized_file, single_file
from mm.engine.pipelines import Pipelines
from mm.engine.placement import Offload, check_offload, place
from mm.engine.previews import previewer
from mm.families.family import Family
from mm.families.folders import family_at
from mm.families.loading import open_folder
from mm.families.registry import family_of

BITS = (None, 4, 8, 16)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    bits: int | None = None,
    offload: Offload = "auto",
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter] = (),
    base: str | Path | None = None,
) -> Engine:
    """Loads a model.

    Args:
        model: an embedded name ("mm-tiny"), a folder of diffusers, of mm (4 bits) or of transformers (Janus, Emu3), a
            name on the Hugging Face hub, or a single .safetensors checkpoint.
        device: "auto", "cpu", "cuda", "mps".
        dtype: "auto", "float32", "bfloat16", "float16".
        bits: 4 makes the 4-bit copy of a local model once and uses it from then on; None loads what is there.
        offload: where weights wait while they are not used; "auto" decides by free memory.
        adapters: patch or LoRA files, each alone or with its scale, applied in this order; or one alone.
        base: for a single file, the model that gives configs and the components that the file lacks.

    Returns:
        The engine. `engine.notes` says what was chosen, and why.

    Raises:
        UserError: where there is no such model, or it cannot be loaded.
    """
    if bits not in BITS:
        raise UserError(f"bits is {bits}; give 4, 8 or 16, or leave it out")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; give {', '.join(DTYPES)}")
    check_path("the model", model)
    adapters = listed(adapters)
    name, base = str(model), None if base is None else local_folder(base)
    if base is not None and not _is_file(model):
        raise UserError(f"base belongs to a model in a single file, and {model} is none; leave base out")
    choice = _choice(device)
    check_offload(offload, choice.device)
    notes = [f"{choice.device}: {choice.reason}"]
    if bits in (4, 8):
        model = _quantized(model, bits, base)
        notes.append(f"{bits}-bit weights from {model}")
    family = None
    if _is_file(model):
        folder: Path | None = None
        kind = _dtype(dtype, None, None, choice)
        pipe = single_file(expanded(model), base, kind)
    else:
        folder = where = local_folder(model)
        family = family_at(where)
        with _advice_on_copies(where if bits in (4, 8) else None):
            kind = _dtype(dtype, folder, family, choice)
            pipe = open_folder(where, dtype=kind)
    family = family or family_of(pipe)
    if family is None:
        notes.append(f"no family is known for {type(pipe).__name__}; its call's own defaults are used")
    notes.append(f"computes in {str(kind).removeprefix('torch.')}")
    notes.append(place(pipe, choice.device, offload))
    names, lines = attach_all(pipe, adapters)
    notes += lines
    pipes = Pipelines(pipe, family, folder, kind)
    release_team()  # the model may be run in another thread
    return Engine(
        pipe,
        capabilities_of(name, pipe, family, folder),
        name=name,
        pipeline_for=pipes.get,
        preview=previewer(pipe, family),
        notes=tuple(note for note in notes if note),
        facts={"bits": bits} if bits in (4, 8) else {},
        adapters=adapters,
        attached=names,
        mixed=family is None or family.mixed,
        own_batches=family is not None and any(":" in name for name in family.pipelines.values()),
    )


def _choice(device: str) -> devices.Choice:
    """The device asked for, or the one that the machine suggests."""
    choice = devices.choose()
    if device == "auto" or device == choice.device:
        return choice
    import torch

    if device.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"device is {device!r}; give auto, cpu, cuda or mps")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device is {device!r}, and torch sees no NVIDIA GPU; give auto or cpu")
    if device.startswith("mps") and not torch.backends.mps.is_available():
        raise UserError(f"device is {device!r}, and torch sees no Apple GPU; give auto or cpu")
    narrow = torch.float32 if device == "cpu" and devices.lacks_bfloat16() else choice.dtype
    return devices.Choice(device=device, dtype=narrow, reason="as asked for")


def _dtype(dtype: str, folder: Path | None, family: Family | None, choice: devices.Choice) -> Any:
    """The type to load in: the one asked for; else the stored one where the device computes in it; else float32."""
    import torch

    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if family is not None and family.dtype == "float32":
        return torch.float32
    if folder is None:
        return choice.dtype
    stored = {"BF16": torch.bfloat16, "F16": torch.float16}.get(memory.stored_type(folder), torch.float32)
    return devices.compute_type(stored, choice)


def _is_file(model: str | Path) -> bool:
    return expanded(model).is_file()


def local_folder(model: str | Path) -> Path:
    """The folder of a model; one that the hub has is downloaded, or taken from the cache.

    Raises:
        UserError: where there is no such model, or it can neither be downloaded nor is it in the cache.
    """
    where = resolve_model(model)
    if isinstance(where, Path):
        return where
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    try:
        return Path(DiffusionPipeline.download(where, use_safetensors=True))
    except Exception as error:  # of many types: no network, no such repository, no index of a pipeline
        why = " ".join(str(error).split())[:300]
        try:
            return Path(snapshot_download(where, local_files_only=True))
        except Exception:
            raise UserError(f"{where} is neither in the cache nor can it be downloaded: {why}") from error


@contextmanager
def _advice_on_copies(copy: Path | None) -> Iterator[None]:
    """Adds to errors of a quantized copy in the cache what to do with it."""
    try:
        yield
    except UserError as error:
        if copy is None:
            raise
        raise UserError(f"{error}; remove the folder {copy}, and the next call makes this copy again") from error


def _quantized(model: str | Path, bits: int, base: Path | None) -> Path:
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.copies import quantized_copy

    if not _is_file(model):
        return quantized_copy(local_folder(model), SVDQuantConfig(bits=bits))
    return quantized_file(expanded(model), base, SVDQuantConfig(bits=bits))
