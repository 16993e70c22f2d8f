"""Source pictures of calls: which arguments of a pipeline are pictures, and plain ones where no other is given.

Pipelines that change pictures (FLUX Fill, Qwen-Image-Edit) are called without one where only their text is of interest.
"""

from __future__ import annotations

import inspect
from typing import Any

from PIL import Image

from mm.families.registry import family_of
from mm.families.sizes import native_side

EDGES: tuple[str, ...] = ("control_image", "hint", "conditioning_frames", "control_video")
PICTURES: tuple[str, ...] = (
    "image", "images", "input_images", "reference_image", "example_image", "image_reference", "original_image",
)  # fmt: skip
MASKS: tuple[str, ...] = ("mask_image", "mask", "control_mask")
VIDEOS: tuple[str, ...] = ("video", "pose_video", "face_video", "control_video", "conditioning_frames")


def draws_from_text(pipe: Any) -> bool:
    """Whether a pipeline's family draws without a source picture; so does one that mm does not know."""
    family = family_of(pipe)
    return family is None or any(task.startswith("text_to_") for task in family.pipelines)


def plain_sources(pipe: Any, count: int, side: int | None = None) -> dict[str, Any]:
    """Arguments of a call with prompts alone.

    Args:
        pipe: a diffusers pipeline.
        count: of the prompts.
        side: of the pictures, in pixels; None takes the pipeline's usual size.

    Returns:
        A grey picture and a white mask a prompt, for a pipeline that draws from a source only; empty for others.
    """
    if draws_from_text(pipe):
        return {}
    family = family_of(pipe)
    usual = family.size.default if family is not None and family.size is not None else 512
    side = side or native_side(pipe) or usual
    takes = inspect.signature(type(pipe).__call__).parameters
    grey, white = Image.new("RGB", (side, side), "gray"), Image.new("L", (side, side), 255)
    made: dict[str, Any] = {name: [grey] * count for name in (*PICTURES, "control_image") if name in takes}
    return made | {name: [white] * count for name in MASKS if name in takes}
