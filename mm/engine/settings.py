"""The settings of a drawn picture: what is kept in its PNG, and by which it can be drawn again."""

from __future__ import annotations

from typing import Any

from PIL import Image

from mm.core.errors import UserError
from mm.engine.capabilities import Capabilities
from mm.engine.requests import Draw, Edit, Turn


def settings_of(request: Draw | Edit | Turn, can: Capabilities, model: str, seed: int, image: Any) -> dict[str, Any]:
    """Settings under the names that every command and the web app write and read; what is not set is left out."""
    prompt = {Draw: "prompt", Edit: "instruction", Turn: "words"}[type(request)]
    settings = {
        "prompt": getattr(request, prompt),
        "negative": getattr(request, "negative", None),
        "seed": seed,
        "steps": can.steps_of(request),
        "mode": can.mode(request),
        "guidance": can.guidance_of(request),
        "image_guidance": getattr(request, "image_guidance", None),
        "strength": getattr(request, "strength", None),
        "scheduler": request.scheduler,
        "model": model,
    }
    if isinstance(image, Image.Image):
        settings |= {"width": image.width, "height": image.height}
    return {key: value for key, value in settings.items() if value is not None}


def request_of(settings: dict[str, Any], can: Capabilities, **changes: Any) -> Draw:
    """The request that draws a picture with these settings again.

    Args:
        settings: as `mm.core.png_settings.read_settings` gives them, of mm or of another program.
        can: of the model that draws now; settings that it does not have are left out.
        changes: fields of `Draw` that replace those of the settings.

    Raises:
        UserError: where the settings hold no prompt, or a value that is not allowed.
    """
    if not isinstance(settings.get("prompt"), str):
        raise UserError("the picture's settings hold no prompt, so it cannot be drawn again")
    same = {"prompt": "prompt", "negative": "negative", "seed": "seed", "steps": "steps", "guidance": "guidance"}
    given = {field: settings[key] for key, field in same.items() if settings.get(key) is not None}
    if settings.get("mode") in can.modes:
        given["mode"] = settings["mode"]
    if settings.get("scheduler") in can.schedulers:
        given["scheduler"] = settings["scheduler"]
    if not can.fixed_size and all(isinstance(settings.get(side), int) for side in ("width", "height")):
        given["size"] = (settings["width"], settings["height"])
    if can.guidance_name is None:
        given.pop("guidance", None)
    return Draw(**(given | changes))
