"""Opens a model as a diffusers pipeline: folders and hub names, and checkpoints in a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.families.family import Family, resolve

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


def single_file(path: Path, base: str | Path | None, dtype: Any) -> Any:
    """A checkpoint in one file: a whole pipeline, or a denoiser for the components of `base`."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file; pickled checkpoints are not read")
    if base is not None:
        from mm.quantization.integrations.nunchaku import load_nunchaku

        pipe = open_pipeline(resolve_model(base), None, dtype)
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
        return getattr(diffusers, class_name).from_single_file(str(path), dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
