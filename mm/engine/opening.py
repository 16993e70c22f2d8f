"""Opens a model as a diffusers pipeline: folders and hub names, and checkpoints in a single file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from mm.core.errors import UserError
from mm.core.safe_tensors import read_header
from mm.families.family import Family, resolve

if TYPE_CHECKING:
    from mm.quantization.config import SVDQuantConfig

# diffusers' types of single-file checkpoints, by their beginnings -> pipeline
_SINGLE_FILES = {
    "xl_base": "StableDiffusionXLPipeline",
    "xl_refiner": "StableDiffusionXLImg2ImgPipeline",
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "playground": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "sana": "SanaPipeline",
    "lumina2": "Lumina2Pipeline",
}


# Names in checkpoints that hold more than a denoiser.
_PREFIX = "model.diffusion_model."
_OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")


def open_pipeline(where: str | Path, family: Family | None, dtype: Any) -> Any:
    """The text-to-image pipeline of a family of its own classes, or diffusers' choice for the folder."""
    from diffusers import DiffusionPipeline

    own = family.pipelines.get("text_to_image", "") if family is not None else ""
    if ":" in own:
        return resolve(own).from_pretrained(where, dtype=dtype)
    try:
        return DiffusionPipeline.from_pretrained(where, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{where} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


def single_file(path: Path, base: Path | None, dtype: Any) -> Any:
    """The pipeline of a checkpoint in one file.

    Args:
        path: a whole pipeline in the original layout (A1111, ComfyUI), or a denoiser alone, also one of Nunchaku.
        base: folder of the model that gives configs and the components that the file lacks; a whole pipeline of a
            known type needs none, where diffusers has its configs or can download them.
        dtype: to load in.

    Raises:
        UserError: where the file cannot be read as such a checkpoint.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file; pickled checkpoints are not read")
    if base is not None:
        return _on_base(path, open_pipeline(base, None, dtype), base, dtype)
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    kind = infer_diffusers_model_type(load_single_file_checkpoint(str(path)))
    class_name = next((c for prefix, c in _SINGLE_FILES.items() if kind.startswith(prefix)), None)
    if class_name is None:
        raise UserError(
            f"{path} is a checkpoint of type {kind!r}, which mm cannot load alone; give the model that it belongs to "
            "as base (--base FOLDER), or load its folder instead"
        )
    return _read(getattr(diffusers, class_name), path, dtype=dtype)


def _on_base(path: Path, pipe: Any, base: Path, dtype: Any) -> Any:
    """The pipeline of `base` with what the file holds: all of it, or the denoiser."""
    names = read_header(path).tensors
    part = next((part for part in ("transformer", "unet") if getattr(pipe, part, None) is not None), None)
    if part is None:
        raise UserError(f"{base} has neither a transformer nor a unet that {path} could replace")
    if any(name.endswith((".qweight", ".wscales")) for name in names):
        from mm.quantization.integrations.nunchaku import load_nunchaku

        setattr(pipe, part, load_nunchaku(path))
        return pipe
    if any(name.startswith(_OTHER_PARTS) for name in names):
        return _read(type(pipe), path, config=str(base), dtype=dtype)
    kind = type(getattr(pipe, part))
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"diffusers reads no single-file checkpoint of {kind.__name__}; load a folder instead")
    source: Any = path
    if part == "transformer" and all(name.startswith(_PREFIX) for name in names):  # diffusers expects it of UNets only
        source = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    made = _read(kind, path, source, config=str(base), subfolder=part, dtype=dtype)
    setattr(pipe, part, made.eval())
    return pipe


def _read(kind: Any, path: Path, source: Any = None, *, dtype: Any, **options: Any) -> Any:
    """diffusers' reading of a file, or of the tensors in it, with its errors in one line."""
    try:
        return kind.from_single_file(source or str(path), dtype=dtype, **options)
    except Exception as error:  # of many types: names, shapes, configs that are not in the cache
        why = " ".join(str(error).split())[:400]
        raise UserError(f"{path} cannot be loaded as {kind.__name__} ({type(error).__name__}: {why})") from error


def quantized_file(path: Path, base: Path | None, config: SVDQuantConfig) -> Path:
    """The cached quantized copy of a checkpoint in one file; made now, through a folder that is removed afterwards.

    Args:
        path: the checkpoint.
        base: as in `single_file`.
        config: the settings.

    Returns:
        The copy's folder.

    Raises:
        UserError: as `single_file` and `mm.quantization.folders.make_copy` do.
    """
    from mm.quantization.folders import copy_folder, is_whole, make_copy

    folder = copy_folder(path.stem, [path, *sorted(base.rglob("*.safetensors") if base else ())], config)
    if is_whole(folder):
        return folder
    with as_folder(path, base, folder.with_name(f"{folder.name}-16-bit")) as plain:
        make_copy(plain, folder, config)
    return folder


@contextmanager
def as_folder(path: Path, base: Path | None, folder: Path) -> Iterator[Path]:
    """A checkpoint in one file as a model folder, for as long as the context is open.

    Args:
        path: the checkpoint.
        base: as in `single_file`.
        folder: where it is written. Where an exception leaves the context it stays, so that the work can go on.

    Raises:
        UserError: as `single_file` does.
    """
    from mm.quantization.sources import main_type

    if not (folder / "model_index.json").is_file():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        single_file(path, base, main_type(path)).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)
