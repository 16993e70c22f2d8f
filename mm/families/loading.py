"""A model folder as a pipeline, of the class that its family names or else of diffusers' choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm.core.errors import UserError
from mm.core.part_files import check_no_pickles, only_variant, packed_parts
from mm.families.family import resolve
from mm.families.folders import family_at


def open_folder(where: Path, **options: Any) -> Any:
    """Loads a pipeline.

    Args:
        where: a checked model folder.
        options: of `from_pretrained`. Where the folder holds one variant of its weights alone, that is loaded.

    Raises:
        UserError: where it cannot be loaded.
    """
    family = family_at(where)
    options = {name: value for name, value in options.items() if value is not None}
    own = family.pipelines.get("text_to_image", "") if family is not None else ""
    if ":" in own:
        return resolve(own).from_pretrained(where, **options)
    from diffusers import DiffusionPipeline

    check_no_pickles(where)
    if variant := only_variant(where):
        options.setdefault("variant", variant)
    try:
        return DiffusionPipeline.from_pretrained(where, use_safetensors=True, **options)
    except UserError:
        raise
    except Exception as error:  # of many types: files, names, shapes, libraries of other quantization methods
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if packed := packed_parts(where):
            raise UserError(f"{where} cannot be loaded: {packed_line(packed)}, and its library says: {why}") from error
        raise UserError(f"{where} cannot be loaded ({why})") from error


def packed_line(packed: dict[str, str]) -> str:
    """Parts that another library has quantized, as a sentence's beginning."""
    return ", ".join(f"{part or 'the model'} is quantized by {method}" for part, method in packed.items())
