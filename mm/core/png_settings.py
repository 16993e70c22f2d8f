"""Settings inside PNG files: written in two dialects, read back from either.

Design choices
- `parameters` holds A1111's text (prompt on the first line, then "Steps: 12, Seed: 7, ..."), which other tools read;
  `mm` holds JSON, which loses nothing. Reading prefers the JSON.
- A file is judged by its content: whatever its suffix, it must be a PNG with text chunks of bounded size.

This module does not know pipelines; settings are a plain dict.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from mm.core.errors import UserError
from mm.core.files import write_bytes

_A1111_NAMES = {"steps": "Steps", "mode": "Sampler", "guidance": "CFG scale", "seed": "Seed", "model": "Model"}
_PAIR = re.compile(r"([A-Z][\w ]*): ([^,]*)")


def to_a1111(settings: dict[str, Any]) -> str:
    """A1111's text for settings with prompt, steps, mode, guidance, seed, size and model (those that are there)."""
    pairs = [f"{label}: {settings[key]}" for key, label in _A1111_NAMES.items() if key in settings]
    if "width" in settings:
        pairs.insert(4, f"Size: {settings['width']}x{settings['height']}")
    return f"{settings.get('prompt', '')}\n{', '.join(pairs)}"


def from_a1111(text: str) -> dict[str, Any]:
    """Settings of an A1111 text; numbers become numbers."""
    prompt, _, rest = text.rpartition("\n") if "\n" in text else (text, "", "")
    found = dict(_PAIR.findall(rest))
    settings: dict[str, Any] = {"prompt": prompt.split("\nNegative prompt:")[0]}
    for key, label in _A1111_NAMES.items():
        if label in found:
            settings[key] = _number(found[label].strip())
    if re.fullmatch(r"\d{1,6}x\d{1,6}", found.get("Size", "").strip()):
        settings["width"], settings["height"] = map(int, found["Size"].strip().split("x"))
    return settings


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def drawing_settings(
    *, prompt: str, seed: int, steps: int, mode: str, guidance: float | None = None, model: str, **more: Any
) -> dict[str, Any]:
    """What a picture was drawn with, under the names that every door of mm writes and reads; `more` as it is."""
    settings = {"prompt": prompt, "seed": seed, "steps": steps, "mode": mode}
    return settings | ({} if guidance is None else {"guidance": guidance}) | {"model": model} | more


def png_bytes(picture: Image.Image, settings: dict[str, Any] | None) -> bytes:
    """The picture as PNG with its settings and size; with `settings` None it carries none."""
    chunks = PngImagePlugin.PngInfo()
    if settings is not None:
        settings = settings | {"width": picture.width, "height": picture.height}
        chunks.add_text("parameters", to_a1111(settings))
        chunks.add_text("mm", json.dumps(settings, ensure_ascii=True))
    out = io.BytesIO()
    picture.save(out, "PNG", pnginfo=chunks)
    return out.getvalue()


def save_png(path: str | Path, picture: Image.Image, settings: dict[str, Any] | None) -> None:
    """Writes the PNG under a temporary name, then renames."""
    write_bytes(path, png_bytes(picture, settings))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings of a PNG. Raises UserError where the file is no PNG or carries none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            texts = dict(getattr(picture, "text", {}))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{path} is no readable PNG ({error})") from error
    if "mm" in texts:
        try:
            settings = json.loads(texts["mm"])
        except (ValueError, RecursionError) as error:  # brackets nested deeper than Python goes
            raise UserError(f"{path}: its settings cannot be read ({error})") from error
        if isinstance(settings, dict):
            return settings
    if "parameters" in texts:
        return from_a1111(texts["parameters"])
    raise UserError(f"{path} carries no settings; it was saved by another program, or with --no-metadata")
