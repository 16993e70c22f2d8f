"""What a model can do, by its folder's configs alone: no tensor file is opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mm.core.errors import UserError
from mm.core.safe_json import read_object
from mm.engine.capabilities import Capabilities
from mm.engine.facts import capabilities_of, class_of
from mm.families.family import Family
from mm.families.folders import family_at


def capabilities_at(folder: Path, name: str) -> Capabilities | None:
    """The capabilities of a model folder, as `mm.load` would find them.

    Args:
        folder: of diffusers, of mm, or of transformers (Janus, Emu3).
        name: of the model, in messages.

    Returns:
        The capabilities; None for a pipeline class that this diffusers does not have.
    """
    family = family_at(folder)
    pipe = _outline(folder, family)
    return None if pipe is None else capabilities_of(name, pipe, family, folder)


def _outline(folder: Path, family: Family | None) -> Any:
    """An object of the pipeline's class that has configs in the place of modules, and the scheduler."""
    index = _json(folder / "model_index.json")
    own = family.pipelines.get("text_to_image", "") if family is not None else ""
    kind = class_of(own if ":" in own else str(index.get("_class_name", "")))
    if kind is None:
        return None
    parts: dict[str, Any] = {}
    for part, classes in index.items():
        if isinstance(classes, list) and len(classes) == 2:
            config = SimpleNamespace(**_json(folder / part / "config.json"))
            parts[part] = None if classes[0] is None else SimpleNamespace(config=config)
    if parts.get("scheduler") is not None:
        parts["scheduler"] = scheduler_at(folder)
    missing = dict.fromkeys(("code_head", "bridge"))
    scale = _vae_scale(parts.get("vae"))
    members = {**missing, **parts, "components": parts, "vae_scale_factor": scale, "__init__": kind.__init__}
    return object.__new__(type(kind.__name__, (kind,), members))


def scheduler_at(folder: Path) -> Any:
    """The scheduler of a model folder; None where it has none, or one that this diffusers does not have.

    Raises:
        UserError: where its file cannot be read.
    """
    import diffusers

    named = _json(folder / "model_index.json").get("scheduler")
    kind = getattr(diffusers, str(named[1]), None) if isinstance(named, list) and len(named) == 2 else None
    try:
        return None if kind is None else kind.from_pretrained(folder, subfolder="scheduler")
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"the scheduler of {folder} cannot be read: {why}") from error


def _vae_scale(vae: Any) -> int | None:
    """Pixels a latent, by the number of the autoencoder's blocks; None for one that is not counted so."""
    config = getattr(vae, "config", None)
    blocks = getattr(config, "block_out_channels", None) or getattr(config, "encoder_block_out_channels", None)
    return 2 ** (len(blocks) - 1) if isinstance(blocks, list) and blocks else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, UserError):
        return {}
