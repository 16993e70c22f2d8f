"""InvokeAI's JSON: `invokeai_metadata` since version 3, `sd-metadata` before it."""

from __future__ import annotations

from typing import Any

from mm.core.foreign_settings.values import collect
from mm.core.safe_json import Fields, parse_json

NAMES = {
    "positive_prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "steps",
    "cfg_scale": "guidance",
    "guidance": "guidance",
    "scheduler": "scheduler",
    "width": "width",
    "height": "height",
}
OLD_NAMES = {
    "seed": "seed",
    "steps": "steps",
    "cfg_scale": "guidance",
    "sampler": "sampler",
    "width": "width",
    "height": "height",
}


def read(text: str, source: str) -> dict[str, Any]:
    """Settings of an `invokeai_metadata` text. Raises UserError where it is none."""
    whole = Fields(parse_json(text, source), source)
    settings = collect(whole.raw, NAMES)
    model = whole.raw.get("model")
    if isinstance(model, dict):
        name = model.get("name", model.get("model_name"))  # version 3 wrote model_name
        if isinstance(name, str) and name:
            settings["model"] = name
    return settings


def read_old(text: str, source: str) -> dict[str, Any]:
    """Settings of an `sd-metadata` text. Raises UserError where it is none."""
    whole = Fields(parse_json(text, source), source)
    image = dict(whole.object("image"))
    prompt = image.pop("prompt", None)
    if isinstance(prompt, list):  # weighted parts
        parts = [part.get("prompt") for part in prompt if isinstance(part, dict)]
        prompt = ", ".join(part for part in parts if isinstance(part, str))
    settings = ({"prompt": prompt} if isinstance(prompt, str) else {}) | collect(image, OLD_NAMES)
    if isinstance(model := whole.raw.get("model_weights"), str) and model:
        settings["model"] = model
    return settings
