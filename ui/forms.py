"""What the fields of the page and the parameters of the API hold, as requests of the engine.

Design choices
- An empty field is the model's own default. Limits of steps and guidance are those of `mm generate`, since the engine's
  requests check them.
- A request of another program may hold anything: every value is checked, and an error names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from mm.core.errors import UserError, shown
from mm.engine.capabilities import Capabilities
from mm.engine.requests import Draw, Edit, stand_ins
from mm.ui.limits import MAX_AREA, MAX_COUNT, MAX_PROMPT, MAX_TRIES


def words(name: str, value: object, *, empty: bool = False) -> str:
    """A text of bounded length.

    Raises:
        UserError: for another type, a text that is too long, and one that is blank unless `empty`.
    """
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name} is {shown(value)}; give a text")
    if len(value) > MAX_PROMPT:
        raise UserError(f"{name} has {len(value)} characters; give at most {MAX_PROMPT}")
    if not empty and not value.strip():
        raise UserError(f"{name} is empty; say in words what is wanted")
    return value


def seed(value: object) -> int | None:
    """A typed or given seed; empty means random."""
    typed = "" if value is None else str(value).strip()
    if not typed:
        return None
    if isinstance(value, bool) or not typed.isascii() or not typed.isdecimal() or len(typed) > 12:
        raise UserError(f"seed is {shown(value)}; give a whole number, or leave it empty for a random one")
    return int(typed)


def _from_text(value: object) -> object:
    """The number in a text field; None for an empty one."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if value.strip() else None
    except ValueError:
        return value


def whole(name: str, value: object) -> int | None:
    """A whole number, also as 3.0 or as text; None and an empty text are no number."""
    value = _from_text(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value % 1:
        raise UserError(f"{name} is {shown(value)}; give a whole number")
    return int(value)


def number(name: str, value: object) -> float | None:
    """A number, also as text; None and an empty text are no number."""
    value = _from_text(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} is {shown(value)}; give a number")
    return float(value)


def flag(name: str, value: object) -> bool:
    """Yes or no; None is no."""
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{name} is {shown(value)}; give true or false")
    return bool(value)


def apart(chosen: object, written: object) -> bool | Mapping[str, str]:
    """`Draw.apart`.

    Args:
        chosen: yes or no, or known things by word.
        written: the field of known things, "WORD=THING, WORD=THING".

    Raises:
        UserError: for known things that no subject is drawn apart for, and those that are not written so.
    """
    if isinstance(chosen, Mapping):
        return chosen
    on, text = flag("apart", chosen), words("stand-ins", written, empty=True)
    things = stand_ins((part for part in text.split(",") if part.strip()), "the field of stand-ins")
    if things and not on:
        raise UserError("stand-ins are given, and subjects are not drawn apart; choose Apart, or empty the field")
    return things or on


def choice(name: str, value: object) -> str | None:
    """A name; None and an empty text are none."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UserError(f"{name} is {shown(value)}; give a name")
    return value


def count(value: object) -> int:
    """The number of pictures."""
    many = whole("count", value)
    if many is None or not 1 <= many <= MAX_COUNT:
        raise UserError(f"count is {shown(value)}; give 1 to {MAX_COUNT}")
    return many


def tries(value: object) -> int:
    """The most times that a picture is drawn; empty means once."""
    many = whole("best_of", value)
    if many is not None and not 1 <= many <= MAX_TRIES:
        raise UserError(f"best_of is {shown(value)}; this page draws a picture 1 to {MAX_TRIES} times")
    return 1 if many is None else many


def size(width: object, height: object, can: Capabilities) -> tuple[int, int] | None:
    """Width and height; a missing one is that of the model's default."""
    wide, high = whole("width", width), whole("height", height)
    if wide is None and high is None:
        return None
    if high is None and can.fixed_size:  # its sizes are known by one side
        high = next((height for width, height in can.sizes if width == wide), None)
    chosen = (can.size[0] if wide is None else wide, can.size[1] if high is None else high)
    if chosen[0] * chosen[1] > MAX_AREA:
        raise UserError(f"size is {chosen[0]} x {chosen[1]}; this page draws at most {MAX_AREA} pixels")
    return chosen


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that all drawing requests have."""
    return {
        "count": count(values.get("count", 1)),
        "seed": seed(values.get("seed")),
        "steps": whole("steps", values.get("steps")),
        "guidance": number("guidance", values.get("guidance")),
        "mode": choice("mode", values.get("mode")),
        "scheduler": choice("scheduler", values.get("scheduler")),
        "fast": flag("fast", values.get("fast")),
        "best_of": tries(values.get("best_of")),
        "strict": flag("strict", values.get("strict")) or None,
    }


def draw_request(values: Mapping[str, Any], can: Capabilities) -> Draw:
    """A drawing from a prompt alone."""
    negative = words("negative", values.get("negative"), empty=True)
    return Draw(
        prompt=words("prompt", values.get("prompt")),
        negative=negative or None,
        size=size(values.get("width"), values.get("height"), can),
        apart=apart(values.get("apart"), values.get("stand_ins")),
        refine=number("refine", values.get("refine")),
        **_sampling(values),
    )


def picture_request(
    task: str, values: Mapping[str, Any], can: Capabilities, picture: Image.Image | None, mask: Image.Image | None
) -> Draw | Edit:
    """A drawing from a picture.

    Args:
        task: "edit", "image_to_image" or "inpaint".
        values: prompt or instruction under "prompt", and the settings.
        can: of the model.
        picture: what is changed.
        mask: white where it may change.

    Raises:
        UserError: where a value is not allowed, or the picture or its mask is missing.
    """
    if task not in can.tasks or task not in ("edit", "image_to_image", "inpaint"):
        raise UserError(f"{can.model} cannot do {shown(task)}; choose one of the ways that are shown")
    if picture is None:
        raise UserError("there is no picture; give one first")
    negative = words("negative", values.get("negative"), empty=True) or None
    if task == "edit":
        return Edit(
            image=picture,
            instruction=words("instruction", values.get("prompt")),
            negative=negative,
            mask=mask,
            image_guidance=number("image_guidance", values.get("image_guidance")),
            size=size(values.get("width"), values.get("height"), can),
            **_sampling(values),
        )
    if task == "inpaint" and mask is None:
        raise UserError("nothing is painted; paint over the part that is to be drawn anew")
    return Draw(
        prompt=words("prompt", values.get("prompt")), negative=negative, image=_for_drawing(picture, can),
        mask=None if task == "image_to_image" or mask is None else _for_drawing(mask, can),
        strength=number("strength", values.get("strength")), **_sampling(values),
    )  # fmt: skip


def _for_drawing(picture: Image.Image, can: Capabilities) -> Image.Image:
    """A source at about the model's size, its sides multiples of what the model takes."""
    scale = min(1.0, max(can.size) / max(picture.size))
    sides = [max(1, round(side * scale / can.multiple)) * can.multiple for side in picture.size]
    return picture.resize((sides[0], sides[1]))
