"""Where the file of an adapter lies, and what the adapter is called. No tensor is read, and torch is not imported."""

from __future__ import annotations

from pathlib import Path

from mm.core.errors import UserError
from mm.core.paths import expanded

PEFT_FILE = "adapter_model.safetensors"
_FILES = (PEFT_FILE, "pytorch_lora_weights.safetensors")  # of peft, of diffusers


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter.

    Args:
        path: the file, or a folder that peft or diffusers saved.

    Raises:
        UserError: where there is none.
    """
    place = expanded(path)
    if place.is_dir():
        found = [place / name for name in _FILES if (place / name).is_file()]
        if not found:
            raise UserError(f"there is no adapter in the folder {path}; it should hold {' or '.join(_FILES)}")
        if len(found) > 1:
            raise UserError(f"the folder {path} holds {' and '.join(_FILES)}; give one of the two files")
        return found[0]
    if not place.is_file():
        raise UserError(f"there is no adapter file {path}; give a .safetensors file, or a folder with one")
    return place


def adapter_name(file: Path) -> str:
    """What an adapter is called: its file, without the suffix; its folder, where peft or diffusers named the file."""
    return file.resolve().parent.name if file.name in _FILES else file.stem


def adapter_label(file: Path) -> str:
    """How an adapter is shown: its file's name, with the folder where peft or diffusers named the file."""
    return f"{file.resolve().parent.name}/{file.name}" if file.name in _FILES else file.name
