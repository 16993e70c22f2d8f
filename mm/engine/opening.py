"""Opens a checkpoint in a single file as a diffusers pipeline."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.errors import UserError
from mm.core.logged import warnings_of
from mm.core.model_files import check_loaded
from mm.core.model_parts import save_pipeline
from mm.core.nouns import counted
from mm.core.safe_tensors import Header, read_header
from mm.engine.checkpoints import PREFIX, check_plain, read_weights, scaled
from mm.families.loading import check_parts, open_folder

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


_WEIGHT = re.compile(r"[\w.]+\.weight\b")
# Names in checkpoints that hold more than a denoiser.
_OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.")


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
    header = read_header(path, "checkpoint")
    if base is not None:
        return _on_base(header, open_folder(base, dtype=dtype), base, dtype)
    _check_whole(header)
    if _is_nunchaku(header):
        raise UserError(f"{path} is a denoiser alone, of Nunchaku; give the model that it belongs to as base (--base)")
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    kind = infer_diffusers_model_type(load_single_file_checkpoint(str(path)))
    class_name = next((c for prefix, c in _SINGLE_FILES.items() if kind.startswith(prefix)), None)
    if class_name is None:
        raise UserError(
            f"{path} is a checkpoint of type {kind!r}, which mm cannot load alone; give the model that it belongs to "
            "as base (--base FOLDER), or load its folder instead"
        )
    return check_parts(_read(getattr(diffusers, class_name), path, dtype=dtype), path)


def _check_whole(header: Header) -> None:
    """Raises UserError unless diffusers can read the file by itself."""
    if header.path.suffix != ".safetensors":
        raise UserError(f"{header.path}: diffusers reads whole checkpoints by their suffix; rename it to .safetensors")
    check_plain(header)
    if scaled(header):
        raise UserError(
            f"{header.path} holds 8-bit floats with scales beside other parts of a model; such weights are read from a "
            "file of the denoiser alone, with --base"
        )


def _is_nunchaku(header: Header) -> bool:
    return any(name.endswith((".qweight", ".wscales")) for name in header.tensors)


def _on_base(header: Header, pipe: Any, base: Path, dtype: Any) -> Any:
    """The pipeline of `base` with what the file holds: all of it, or the denoiser."""
    path = header.path
    part = next((part for part in ("transformer", "unet") if getattr(pipe, part, None) is not None), None)
    if part is None:
        raise UserError(f"{base} has neither a transformer nor a unet that {path} could replace")
    if _is_nunchaku(header):
        from mm.quantization.integrations.nunchaku import load_nunchaku

        setattr(pipe, part, load_nunchaku(path))
        return pipe
    if any(name.startswith(_OTHER_PARTS) for name in header.tensors):
        _check_whole(header)
        return check_parts(_read(type(pipe), path, config=str(base), dtype=dtype), path)
    kind = type(getattr(pipe, part))
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"diffusers reads no single-file checkpoint of {kind.__name__}; load a folder instead")
    weights = read_weights(path)
    if part == "unet" and any(name.startswith("input_blocks.") for name in weights):  # diffusers knows them by it
        weights = {f"{PREFIX}{name}": tensor for name, tensor in weights.items()}
    made = _read(kind, path, weights, config=str(base), subfolder=part, dtype=dtype)
    check_loaded(made, path)
    setattr(pipe, part, made.eval())
    return pipe


def _read(kind: Any, path: Path, source: Any = None, *, dtype: Any, **options: Any) -> Any:
    """diffusers' reading of a file, or of the tensors in it, with its errors in one line."""
    said: list[str] = []
    try:
        with warnings_of("diffusers.loaders.single_file_model", said):
            made = kind.from_single_file(source or str(path), dtype=dtype, **options)
    except NotImplementedError as error:  # a weight that was in no file cannot be converted
        raise UserError(f"{path} lacks weights that {kind.__name__} has by the config of its base") from error
    except Exception as error:  # of many types: names, shapes, configs that are not in the cache
        why = " ".join(str(error).split())[:400]
        raise UserError(f"{path} cannot be loaded as {kind.__name__} ({type(error).__name__}: {why})") from error
    unused = [name for text in said if "were not used" in text for name in _WEIGHT.findall(text)]
    if source is not None and unused:
        raise UserError(
            f"{path} holds {counted(len(unused), 'weight')} for which {kind.__name__} has no place by the config of "
            f"its base ({', '.join(unused[:3])}); give the base that the file belongs to"
        )
    return made


def quantized_file(path: Path, base: Path | None, config: SVDQuantConfig) -> Path:
    """The cached quantized copy of a checkpoint in one file; made now, through a folder that is removed afterwards.

    Args:
        path: the checkpoint.
        base: as in `single_file`.
        config: the settings.

    Returns:
        The copy's folder.

    Raises:
        UserError: as `single_file` and `mm.quantization.copies.make_copy` do.
    """
    from mm.quantization.copies import copy_folder, is_whole, make_copy, making, model_files

    folder = copy_folder(path.stem, [path, *(model_files(base) if base else ())], config)
    with making(folder):
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
        save_pipeline(single_file(path, base, main_type(path)), folder)
    yield folder
    shutil.rmtree(folder)
