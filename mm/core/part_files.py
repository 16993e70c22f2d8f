"""How the parts of a model folder are stored, by the names of their files and by their configs alone.

Design choices
- Weights in pickles (.bin, .pt, .ckpt) are refused: reading them may run code.
- Many folders hold one variant only, mostly fp16, as they were downloaded. It is found here, since diffusers loads the
  plain files, or those of the variant that it is given.
"""

from __future__ import annotations

import re
from pathlib import Path

from mm.core.errors import UserError, shown
from mm.core.safe_json import read_object

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")
OURS = ("svdquant", "nunchaku_lite")  # methods whose layers mm reads


def places(folder: Path) -> dict[str, Path]:
    """The folders that may hold weights, by the part's name; "" for the model folder itself."""
    return {"": folder} | {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}


def check_weights_there(folder: Path) -> None:
    """Raises UserError where a part has no weights: they are in pickles only, or there are none.

    Args:
        folder: a model in diffusers' or transformers' layout.
    """
    for name, place in places(folder).items():
        if any(place.glob("*.safetensors")):
            continue
        if not name.startswith(("scheduler", "tokenizer")):
            check_no_pickle(place)
        if name and _is_model(place):
            raise UserError(f"{place} holds the config of a model and no weights; copy or download it again")


def check_no_pickle(place: Path) -> None:
    """Raises UserError where a folder without safetensors files holds a pickle."""
    pickles = [path for path in sorted(place.iterdir()) if path.suffix in _PICKLES] if place.is_dir() else []
    if pickles:
        raise UserError(
            f"{pickles[0]} is a pickle, and reading one may run code: {place} holds no safetensors file. Load the "
            "model where you trust it and save it again (pipe.save_pretrained(..., safe_serialization=True))"
        )


def _is_model(place: Path) -> bool:
    """Whether a part is a model of a library by its config: schedulers and tokenizers have other files."""
    try:
        config = read_object(place / "config.json")
    except (OSError, UserError):
        return False
    return "_diffusers_version" in config or "transformers_version" in config


def only_variant(folder: Path) -> str | None:
    """The variant that must be named to load a folder: one in which a part has its weights, and has no plain ones.

    Args:
        folder: a model in diffusers' layout.

    Raises:
        UserError: where parts have their weights in different variants alone.
    """
    found: dict[str, str] = {}
    for name, place in places(folder).items():
        kinds = [match.group(1) for path in place.iterdir() if (match := _WEIGHTS.fullmatch(path.name))]
        if kinds and None not in kinds:
            found[min(kinds)] = name
    if len(found) > 1:
        each = ", ".join(f"{name} in {kind}" for kind, name in sorted(found.items()))
        raise UserError(f"{folder} holds weights of several variants and no plain ones ({each}); copy it again")
    return next(iter(found), None)


def packed_parts(folder: Path) -> dict[str, str]:
    """The parts that another library has quantized, with its name.

    Args:
        folder: a model in diffusers' or transformers' layout.
    """
    found: dict[str, str] = {}
    for name, place in places(folder).items():
        try:
            settings = read_object(place / "config.json").get("quantization_config")
        except (OSError, UserError):
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if method is not None and method not in OURS:
            found[name] = shown(method, 40).strip('"')
    return found
