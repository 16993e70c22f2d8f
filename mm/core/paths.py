"""Where models lie: the embedded ones, a folder, or a name on the Hugging Face hub.

Design choices:
- An embedded name wins over a folder of that name in the working directory; write `./mm-tiny` for the folder.
- A folder is checked before anything heavy is imported, so that a half-copied model gives one clear line at once.
- A hub name is passed through as it is; it must read owner/name, so that a misspelt embedded name never goes online.
- No tensor file is opened.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mm.core.checks import check_path
from mm.core.errors import UserError
from mm.core.lazy import checkout
from mm.core.safe_json import read_object

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INDEX = "model_index.json"


def expanded(path: str | Path) -> Path:
    """A path with `~` and `~NAME` in front as home folders; as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError there


def weights_dir() -> Path:
    """The folder of embedded weights: `weights/` in a checkout, `mm/weights` in an installed wheel."""
    root = checkout()
    return (root or Path(__file__).resolve().parents[1]) / "weights"


def embedded_models() -> list[str]:
    """Names that `resolve_model` knows by itself."""
    return sorted(index.parent.name for index in weights_dir().glob(f"*/{_INDEX}"))


def resolve_model(name_or_folder: str | Path) -> Path | str:
    """An embedded name or a folder becomes a checked path to a diffusers model; a hub name comes back as it is."""
    check_path("the model", name_or_folder)
    name = str(name_or_folder)
    embedded = weights_dir() / name
    if re.fullmatch(r"[\w.-]*\w", name) and embedded.is_dir():
        return _checked(embedded)
    folder = expanded(name)
    if name and folder.is_dir():
        return _checked(folder)
    if name and folder.exists():
        raise UserError(f"{name!r} is a file; a model is a folder with {_INDEX} in it")
    if _HUB_NAME.fullmatch(name):
        return name
    raise UserError(
        f"no model {name!r}: embedded are {', '.join(embedded_models()) or 'none'}; "
        "otherwise give an existing folder, or a hub name as owner/name"
    )


def model_type(folder: str | Path) -> str | None:
    """The type of a model in transformers' layout, by its config.json; None for a folder of another layout."""
    folder = expanded(folder)
    if (folder / _INDEX).is_file():
        return None
    try:
        kind = read_object(folder / "config.json").get("model_type")
    except (OSError, UserError):
        return None
    return kind if isinstance(kind, str) else None


def _checked(folder: Path) -> Path:
    """Raises unless every component that the index names has its folder."""
    index = folder / _INDEX
    if model_type(folder) is not None:  # mm.families.folders says which types are known
        return folder
    if not index.is_file():
        raise UserError(f"{folder} holds no {_INDEX}, so it is no complete diffusers model; copy or save it again")
    try:
        entries = read_object(index, "model index").items()
    except UserError as error:
        raise UserError(f"a model index cannot be read: {error}; copy or save the model again") from error
    parts = [key for key, value in entries if isinstance(value, list) and value and value[0] is not None]
    missing = [part for part in parts if len(part) > 255 or not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder} lacks the folders {', '.join(missing)} named in {_INDEX}; copy or save it again")
    return folder
