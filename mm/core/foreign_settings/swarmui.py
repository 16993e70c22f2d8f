"""SwarmUI's JSON: an object `sui_image_params` by parameter ids, and further objects beside it."""

from __future__ import annotations

from typing import Any

from mm.core.foreign_settings.values import collect
from mm.core.safe_json import Fields, parse_json

NAMES = {
    "prompt": "prompt",
    "negativeprompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "cfgscale": "guidance",
    "sampler": "sampler",
    "scheduler": "scheduler",
    "width": "width",
    "height": "height",
    "model": "model",
}


def read(text: str, source: str) -> dict[str, Any]:
    """Settings of such a text. Raises UserError where it is none."""
    whole = Fields(parse_json(text, source), source)
    settings = collect(whole.object("sui_image_params"), NAMES)
    beside = {key: value for key, value in whole.raw.items() if key != "sui_image_params"}
    if beside:
        settings["other"] = settings.get("other", {}) | beside
    return settings
