"""Settings inside PNG files: written in two dialects, read back from those and from other programs'.

Design choices
- `parameters` holds A1111's text (prompt on the first line, then "Steps: 12, Seed: 7, ..."), which other tools read;
  `mm` holds JSON, which loses nothing. Reading prefers the JSON.
- A file is judged by its content: whatever its suffix, it must be a PNG with text chunks of bounded size.
- Settings are a plain dict.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.foreign_settings import a1111, read_foreign
from mm.core.nouns import with_article
from mm.core.png_chunks import read_texts
from mm.core.safe_json import Fields, parse_json

_A1111_NAMES = {
    "steps": "Steps", "mode": "Sampler", "guidance": "CFG scale", "seed": "Seed", "model": "Model",
    "scheduler": "Schedule type", "strength": "Denoising strength",
}  # fmt: skip
_MODES = ("flow", "codes")  # what mm writes where other programs name their sampler


def to_a1111(settings: dict[str, Any]) -> str:
    """A1111's text for settings, as far as it has names for them; those that are not there are left out.

    Adapters become A1111's `<lora:name:scale>` at the end of the prompt.
    """
    tags = [f"<lora:{Path(a['file']).stem}:{a['scale']:g}>" for a in settings.get("adapters", ())]
    if tags:
        settings = settings | {"prompt": " ".join([str(settings.get("prompt", "")), *tags])}
    return a1111.write(settings, _A1111_NAMES)


def from_a1111(text: str) -> dict[str, Any]:
    """Settings of an A1111 text, of mm or another program; what has no name in mm is under "other"."""
    settings = a1111.read(text)
    if settings.get("sampler") in _MODES:
        settings["mode"] = settings.pop("sampler")
    return settings


def drawing_settings(
    *, prompt: str, seed: int, steps: int, mode: str, guidance: float | None = None, model: str, **more: Any
) -> dict[str, Any]:
    """Settings of a picture, under the names that all commands and pages of mm write and read; `more` as it is."""
    settings = {"prompt": prompt, "seed": seed, "steps": steps, "mode": mode}
    return settings | ({} if guidance is None else {"guidance": guidance}) | {"model": model} | more


def check_picture(picture: object) -> None:
    """Raises UserError unless this is a picture that files can hold; pipelines can be asked for others."""
    if not isinstance(picture, Image.Image):
        raise UserError(
            f"a file takes a PIL picture, not {with_article(type(picture).__name__)}; leave output_type out"
        )


def png_bytes(picture: Image.Image, settings: dict[str, Any] | None) -> bytes:
    """The picture as PNG with its settings and size; with `settings` None it carries none.

    Raises:
        UserError: for what is no PIL picture.
    """
    check_picture(picture)
    chunks = PngImagePlugin.PngInfo()
    if settings is not None:
        settings = settings | {"width": picture.width, "height": picture.height}
        chunks.add_text("parameters", to_a1111(settings))
        chunks.add_text("mm", json.dumps(settings, ensure_ascii=True))
    out = io.BytesIO()
    picture.save(out, "PNG", pnginfo=chunks)
    return out.getvalue()


def save_png(path: str | Path, picture: Image.Image, settings: dict[str, Any] | None) -> None:
    """Writes a PNG, whole or not at all. One that is there is replaced.

    Args:
        path: the file; its folder is made where it is missing.
        picture: its pixels.
        settings: what it was drawn with; None writes none.

    Raises:
        UserError: where the path is a folder, or lies in a file.
    """
    write_bytes(path, png_bytes(picture, settings))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that a PNG was drawn with, by mm or by another program.

    Args:
        path: a PNG file, of any suffix. The picture in it is not decoded.

    Returns:
        Of mm's own pictures, all that was written. Of others (A1111, Forge, ComfyUI, InvokeAI, SwarmUI) prompt,
        negative_prompt, seed, steps, guidance, sampler, scheduler, width, height and model where they are known, and
        the rest under "other".

    Raises:
        UserError: where the file is no PNG, carries no settings, or settings that are damaged.
    """
    texts = read_texts(path)
    if "mm" in texts:
        return own_settings(texts["mm"], path)
    if "parameters" in texts and not texts["parameters"].lstrip().startswith("{"):
        return from_a1111(texts["parameters"])
    settings = read_foreign(texts, str(path))
    if settings is None:
        raise UserError(f"{path} carries no settings that are known; it was saved by another program, or without them")
    return settings


def own_settings(text: str, path: str | Path) -> dict[str, Any]:
    """What mm wrote as JSON, with the types that it has. Raises UserError for anything else."""
    source = f"{path}: its settings cannot be read:"
    fields = Fields(parse_json(text, source), source)
    for key, check in _CHECKS.items():
        if key in fields.raw:
            check(fields, key)
    return fields.raw


_CHECKS: dict[str, Callable[[Fields, str], object]] = {
    "prompt": lambda fields, key: fields.text(key),
    "mode": lambda fields, key: fields.text(key),
    "model": lambda fields, key: fields.text(key),
    "seed": lambda fields, key: fields.whole(key, 0, 2**64 - 1),
    "steps": lambda fields, key: fields.whole(key, 1, 100_000),
    "guidance": lambda fields, key: fields.number(key, -1000, 1000),
    "width": lambda fields, key: fields.whole(key, 1, 1_000_000),
    "height": lambda fields, key: fields.whole(key, 1, 1_000_000),
}
