"""The text of A1111's web UI, which Forge, SD.Next and many sites write as well.

    a dog on grass
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 99, Size: 512x768, Model: dreamy, ControlNet 0: "Module: canny"

Design choices
- The last line holds the settings where it begins with "Steps: N" or holds three pairs; the line that begins with
  "Negative prompt:" begins the negative prompt. Everything before is the prompt, empty where there is nothing.
- A quoted value is one JSON text, whatever stands in it. A value that begins with a bracket is one JSON value (Civitai
  writes such). Other values end at the comma; a piece without a key belongs to the value before it.
- The line is read once from left to right, in time linear in its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mm.core.foreign_settings.values import collect

NAMES = {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "scheduler",
    "CFG scale": "guidance",
    "Seed": "seed",
    "Model": "model",
}
NEGATIVE = "Negative prompt:"
_KEY = re.compile(r"\s*([A-Za-z][\w /().+-]{0,79}):\s*")
_STEPS = re.compile(r"\s*Steps:\s*[0-9]{1,9}\s*(?:,|$)")
_SIZE = re.compile(r"\s*([0-9]{1,6})x([0-9]{1,6})\s*")
_DECODER = json.JSONDecoder()
MAX_BROKEN = 20  # values that begin as JSON and are none; each costs a pass over the line, so others are not tried


def read(text: str) -> dict[str, Any]:
    """Settings of such a text: mm's names, and everything else by its own name under "other"."""
    lines = text.replace("\r\n", "\n").split("\n")
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    pairs = _pairs(lines[-1])
    if _STEPS.match(lines[-1]) or len(pairs) >= 3:
        lines.pop()
    else:
        pairs = {}
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), None)
    settings: dict[str, Any] = {"prompt": "\n".join(lines[:start]).strip()}
    if start is not None:
        settings["negative_prompt"] = "\n".join(lines[start:]).removeprefix(NEGATIVE).strip()
    size = _SIZE.fullmatch(str(pairs.get("Size", "")))
    if size and min(map(int, size.groups())) > 0:
        settings["width"], settings["height"] = map(int, size.groups())
        del pairs["Size"]
    return settings | collect(pairs, NAMES)


def write(settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Such a text. names: the program's key by mm's name, in the order in which they are written."""
    pairs = [f"{label}: {_quoted(settings[key])}" for key, label in names.items() if key in settings]
    if "width" in settings:
        pairs.insert(4, f"Size: {settings['width']}x{settings['height']}")
    negative = settings.get("negative_prompt")
    parts = [str(settings.get("prompt", "")), *([f"{NEGATIVE} {negative}"] if negative else []), ", ".join(pairs)]
    return "\n".join(parts)


def _quoted(value: object) -> str:
    """A value as it is, or as a JSON text where a comma, colon, quote or line end would break the line."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _pairs(line: str) -> dict[str, Any]:
    """Values by key. A key given twice keeps its first value."""
    found: dict[str, list[Any]] = {}
    at, tries = 0, MAX_BROKEN
    pieces: list[Any] = []  # of the pair before
    while at < len(line):
        key = _KEY.match(line, at)
        if key is None:
            end = _comma(line, at)
            pieces.append(line[at:end].strip())
            at = end + 1
            continue
        value, at = _value(line, key.end()) if tries else _plain(line, key.end())
        tries -= tries > 0 and isinstance(value, str) and value[:1] in ('"', "[", "{")  # read as it stands: broken
        pieces = [value]
        found.setdefault(key[1].strip(), pieces)
    return {key: _joined(pieces) for key, pieces in found.items()}


def _joined(pieces: list[Any]) -> Any:
    """A value with the loose pieces after it."""
    return pieces[0] if len(pieces) == 1 else ", ".join(str(piece) for piece in pieces if piece != "")


def _value(line: str, at: int) -> tuple[Any, int]:
    """A value, and where the next pair begins."""
    if line[at : at + 1] in ('"', "[", "{"):
        try:
            value, end = _DECODER.raw_decode(line, at)
        except (ValueError, RecursionError):
            return _plain(line, at)
        rest = _comma(line, end)
        if not line[end:rest].strip():
            return value, rest + 1
    return _plain(line, at)


def _plain(line: str, at: int) -> tuple[str, int]:
    """The text up to the comma, and where the next pair begins."""
    end = _comma(line, at)
    return line[at:end].strip(), end + 1


def _comma(line: str, at: int) -> int:
    end = line.find(",", at)
    return len(line) if end < 0 else end
