"""Pipelines of videos as pipelines of pictures: one frame is asked for, and taken out of what they return."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from mm.core.errors import UserError
from mm.core.nouns import counted, with_article

FRAME_NAMES: tuple[str, ...] = ("num_frames", "frames", "video_length")  # arguments that count them


def one_frame(takes: Container[str]) -> dict[str, Any]:
    """Arguments of a call by which a pipeline of videos gives one frame; none for others.

    Args:
        takes: names of the call's arguments.
    """
    counts = {name: 1 for name in FRAME_NAMES if name in takes}
    return counts | {"output_type": "pil"} if counts else {}


def pictures_of(output: Any) -> Any:
    """The pictures of a pipeline's output, whatever its class calls them.

    Raises:
        UserError: for an output without pictures, and for a video of several frames.
    """
    for name in ("images", "image"):
        if hasattr(output, name):
            return getattr(output, name)
    if hasattr(output, "frames"):
        return [_only(video) for video in output.frames]
    if isinstance(output, tuple) and output:
        return output[0]
    raise UserError(
        f"the pipeline returned {with_article(type(output).__name__)} without pictures; mm draws pictures, no videos"
    )


def _only(video: Any) -> Any:
    if len(video) != 1:
        raise UserError(f"the pipeline returned {counted(len(video), 'frame')}; mm draws pictures, no videos")
    return video[0]
