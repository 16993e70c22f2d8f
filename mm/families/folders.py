"""The family of a model folder, by its index or config; no tensor file is opened."""

from __future__ import annotations

from pathlib import Path

from mm.core.errors import UserError
from mm.core.paths import expanded, model_type
from mm.core.safe_json import read_object
from mm.families.family import Family
from mm.families.registry import family_of, model_types


def family_at(folder: str | Path) -> Family | None:
    """The family of a model folder, by the pipeline's class and the configs of its components.

    Args:
        folder: a folder in diffusers' or transformers' layout.

    Returns:
        The family, or None for a pipeline of no known one.

    Raises:
        UserError: for a model of transformers of an unknown type.
    """
    kind = unified_type(folder)
    if kind is not None:
        return family_of(kind)
    index = _json(expanded(folder) / "model_index.json")
    name = index.get("_class_name")
    if not isinstance(name, str):
        return None
    configs = [
        _json(expanded(folder) / part / "config.json")
        for part, classes in index.items()
        if isinstance(classes, list) and part.split("_")[0] in ("transformer", "unet")
    ]
    return family_of(name, configs[0] if configs else None)


def unified_type(folder: str | Path) -> str | None:
    """The type of a public unified model in transformers' layout; None for a folder of another layout.

    Raises:
        UserError: for a model of transformers of an unknown type.
    """
    kind = model_type(folder)
    if kind is None or kind in model_types():
        return kind
    raise UserError(
        f"{folder} holds a model of type {kind!r}; of transformers' models, known are {', '.join(model_types())}"
    )


def _json(path: Path) -> dict[str, object]:
    try:
        return read_object(path)
    except (OSError, UserError):
        return {}
