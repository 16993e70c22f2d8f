"""`mm.load`: any model as an `Engine`.

Design choices
- Names are resolved in one order: embedded model, folder, single file, name on the Hugging Face hub.
- One pipeline is loaded. Others of the family (image-to-image, inpainting, editing, reading) share its modules: through
  diffusers' `from_pipe`, or for families with classes of their own by loading only the components that are missing.
- Device, type and offload are chosen from what the machine has, and the choice is said in `Engine.notes`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mm.core.devices import choose_compute
from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.engine import memory
from mm.engine.engine import Engine
from mm.engine.facts import FAMILY_TASKS, capabilities_of
from mm.engine.previews import previewer
from mm.families.family import Family, resolve
from mm.families.folders import family_at
from mm.families.registry import family_of

Offload = Literal["auto", "none", "model", "group"]
BITS = (None, 4, 8, 16)


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    bits: int | None = None,
    offload: Offload = "auto",
    adapters: Sequence[str | tuple[str, float]] = (),
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
        adapters: patch or LoRA files, each alone or with its scale, applied in this order.
        base: for a single file that holds a denoiser alone, the model that the other components come from.

    Returns:
        The engine. `engine.notes` says what was chosen, and why.

    Raises:
        UserError: where there is no such model, or it cannot be loaded.
    """
    if bits not in BITS:
        raise UserError(f"bits is {bits}; give 4, 8 or 16, or leave it out")
    name = str(model)
    choice = choose_compute(device, dtype)
    notes = [choice.reason]
    if bits in (4, 8):
        model = _quantized(model, bits)
        notes.append(f"{bits}-bit weights from {model}")
    family = None
    if _is_file(model):
        pipe = _single_file(Path(model), base, choice.dtype)
        folder: Path | None = None
    else:
        where = resolve_model(model)
        folder = where if isinstance(where, Path) else None
        family = family_at(where) if folder is not None else None
        pipe = _pipeline(where, family, choice.dtype)
    family = family or family_of(pipe)
    if family is None:
        notes.append(f"no family is known for {type(pipe).__name__}; its call's own defaults are used")
    notes.append(place(pipe, choice.device, offload))
    for adapter in adapters:
        notes.append(attach(pipe, adapter))
    pipes = Pipelines(pipe, family, folder, choice.dtype)
    return Engine(
        pipe,
        capabilities_of(name, pipe, family),
        name=name,
        pipeline_for=pipes.get,
        preview=previewer(pipe, family),
        notes=tuple(note for note in notes if note),
        facts={"bits": bits} if bits in (4, 8) else {},
    )


def _is_file(model: str | Path) -> bool:
    return Path(model).expanduser().is_file()


def _quantized(model: str | Path, bits: int) -> Path:
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.folders import quantized_copy

    return quantized_copy(model, SVDQuantConfig(bits=bits))


def _pipeline(where: str | Path, family: Family | None, dtype: Any) -> Any:
    """The text-to-image pipeline of a family of its own classes, or diffusers' choice for the folder."""
    from diffusers import DiffusionPipeline

    own = family.pipelines.get("text_to_image", "") if family is not None else ""
    if ":" in own:
        return resolve(own).from_pretrained(where, torch_dtype=dtype)
    try:
        return DiffusionPipeline.from_pretrained(where, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{where} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


def _single_file(path: Path, base: str | Path | None, dtype: Any) -> Any:
    """A checkpoint in one file: a whole pipeline, or a denoiser for the components of `base`."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file; pickled checkpoints are not read")
    if base is not None:
        from mm.quantization.integrations.nunchaku import load_nunchaku

        rest = resolve_model(base)
        pipe = _pipeline(rest, None, dtype)
        name = next((part for part in ("transformer", "unet") if getattr(pipe, part, None) is not None), None)
        if name is None:
            raise UserError(f"{base} has neither a transformer nor a unet that {path} could replace")
        setattr(pipe, name, load_nunchaku(path))
        return pipe
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    kind = infer_diffusers_model_type(load_single_file_checkpoint(str(path)))
    class_name = next((c for prefix, c in _SINGLE_FILES.items() if kind.startswith(prefix)), None)
    if class_name is None:
        raise UserError(f"{path} is a checkpoint of type {kind!r}, which mm cannot load alone; load its folder instead")
    try:
        return getattr(diffusers, class_name).from_single_file(str(path), torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


# diffusers' types of single-file checkpoints -> pipeline
_SINGLE_FILES = {
    "xl_base": "StableDiffusionXLPipeline", "xl_refiner": "StableDiffusionXLImg2ImgPipeline", "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline", "inpainting": "StableDiffusionInpaintPipeline", "playground": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "sana": "SanaPipeline", "lumina2": "Lumina2Pipeline",
}  # fmt: skip


def place(pipe: Any, device: str, offload: Offload) -> str:
    """Moves a pipeline to its device, or sets up its offload; says which, empty for the CPU."""
    if device == "cpu":
        if offload not in ("auto", "none"):
            raise UserError(f"offload is {offload!r} and the device is the CPU, where all weights are already")
        pipe.to("cpu")
        return ""
    import torch

    needed, largest = sizes(pipe)
    chosen, why = offload, "as asked for"
    if offload == "auto":
        free = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else memory.free_memory()
        chosen, why = memory.choose_offload(needed, largest, free)
    if chosen == "none":
        pipe.to(device)
    elif chosen == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    return f"offload: {chosen}, {why}"


def sizes(pipe: Any) -> tuple[int, int]:
    """Bytes of all components of a pipeline, and of the largest one."""
    each = [
        sum(t.numel() * t.element_size() for t in (*part.parameters(), *part.buffers()))
        for part in pipe.components.values()
        if hasattr(part, "parameters") and hasattr(part, "buffers")
    ]
    return sum(each), max(each, default=0)


def attach(pipe: Any, adapter: str | Path | tuple[str | Path, float]) -> str:
    """Applies a patch of mm or a LoRA of another program; says what was applied."""
    from mm.adapters.formats import read_lora
    from mm.adapters.patch import Patch
    from mm.adapters.patch_file import META
    from safetensors import safe_open

    path, scale = (adapter, 1.0) if isinstance(adapter, str | Path) else adapter
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no adapter file {path}")
    with safe_open(file, "pt") as opened:
        ours = META in (opened.metadata() or {})
    patch = Patch.load(file) if ours else read_lora(file, pipe, name=file.stem)
    return f"{file.name}: {patch.apply(pipe, scale)}, scale {scale:g}"


class Pipelines:
    """The pipelines of one model by task; made at first use, all with the same modules."""

    def __init__(self, pipe: Any, family: Family | None, folder: Path | None, dtype: Any) -> None:
        self.pipe, self.family, self.folder, self.dtype = pipe, family, folder, dtype
        self.made: dict[str, Any] = {}

    def get(self, task: str) -> Any:
        """The pipeline for a task of `mm.engine.capabilities.TASKS`."""
        if task not in self.made:
            self.made[task] = self._make(task)
        return self.made[task]

    def _make(self, task: str) -> Any:
        name = self.family.pipelines.get(FAMILY_TASKS[task], "") if self.family is not None else ""
        if not name or name.rpartition(":")[2] == type(self.pipe).__name__:
            return self.pipe
        if ":" in name:
            return self._own(resolve(name))
        import diffusers

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(diffusers, name).from_pipe(self.pipe)

    def _own(self, kind: type) -> Any:
        """A pipeline of a family's own class: the modules that are loaded, and from the folder those that are not."""
        wanted = set(inspect.signature(kind.__init__).parameters) - {"self"}
        shared = {key: part for key, part in self.pipe.components.items() if key in wanted and part is not None}
        if wanted <= set(shared):
            return kind(**shared)
        if self.folder is None:
            raise UserError(f"{kind.__name__} needs {', '.join(sorted(wanted - set(shared)))}; load it from a folder")
        made = kind.from_pretrained(self.folder, torch_dtype=self.dtype, **shared)  # type: ignore[attr-defined]
        return made.to(self.pipe.device)
