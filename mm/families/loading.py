"""A model folder as a pipeline, of the class that its family names or else of diffusers' choice.

Design choices
- What the libraries fill in silence is an error here: transformers gives random values to weights that no file holds,
  and diffusers leaves them without memory. NaN among weights would draw black pictures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from mm.core.errors import UserError
from mm.core.logged import warnings_of
from mm.core.model_files import check_loaded
from mm.core.part_files import check_weights_there, only_variant, packed_parts, places
from mm.core.safe_tensors import read_header
from mm.families.family import resolve
from mm.families.folders import family_at

_LOST = re.compile(r"^([\w.]+) *\| *MISSING", re.MULTILINE)  # in transformers' report of a model that it loaded


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

    check_weights_there(where)
    if variant := only_variant(where):
        options.setdefault("variant", variant)
    said: list[str] = []
    try:
        with warnings_of("transformers.modeling_utils", said):
            pipe = DiffusionPipeline.from_pretrained(where, use_safetensors=True, **options)
    except UserError:
        raise
    except Exception as error:  # of many types: files, names, shapes, libraries of other quantization methods
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        if packed := packed_parts(where):
            raise UserError(f"{where} cannot be loaded: {packed_line(packed)}, and its library says: {why}") from error
        raise UserError(f"{where} cannot be loaded ({why})") from error
    if lost := [match for text in said for match in _LOST.findall(text)]:  # transformers fills them with random values
        raise UserError(f"{where}: {lost[0]} of a text encoder is in no file; copy or save the model again")
    try:
        return check_parts(pipe, where)
    except UserError as error:
        if not _saved_with_peft(where):
            raise
        raise UserError(
            f"{where} was saved while adapters of peft were attached, and diffusers cannot load what that writes: load "
            "the model that it was made from, and save it after pipe.fuse_lora() and pipe.unload_lora_weights()"
        ) from error


def _saved_with_peft(folder: Path) -> bool:
    files = [path for place in places(folder).values() for path in place.glob("*.safetensors")]
    return any(".base_layer." in name for path in files for name in read_header(path).tensors)


def check_parts(pipe: Any, source: Path) -> Any:
    """The pipeline itself. Raises UserError where a part lacks a weight, or holds NaN or infinity.

    Args:
        pipe: a loaded pipeline.
        source: where it was read from.
    """
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            check_loaded(part, f"{source}: {name}")
    return pipe


def packed_line(packed: dict[str, str]) -> str:
    """Parts that another library has quantized, as a sentence's beginning."""
    return ", ".join(f"{part or 'the model'} is quantized by {method}" for part, method in packed.items())
