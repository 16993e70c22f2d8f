"""Whether pictures are of the kind that the model was trained on, and what is said of those that are not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

if TYPE_CHECKING:
    from mm.models.connectors import Connector


def are_outside(connector: Connector, tokens_BLC: torch.Tensor) -> list[bool] | None:
    """Whether each picture is from outside, by its tokens; None where the connector has no statistics."""
    distance_B = connector.domain_distance(tokens_BLC)
    return None if distance_B is None else (distance_B > 1).tolist()


def size_notes(size: tuple[int, int], side: int) -> list[str]:
    """What is said of a picture of another size than the one that is read: `side` pixels on each side."""
    if size == (side, side):
        return []
    what = "it" if size[0] == size[1] else "its middle square"
    return [f"the picture has {size[0]} x {size[1]} pixels; {what} is read at {side} x {side}"]


def warn_of(
    connector: Connector, tokens_BLC: torch.Tensor, pictures: Sequence[Image.Image], side: int, *, stacklevel: int,
    result: int | None = None,
) -> None:  # fmt: skip
    """Warns of source pictures from outside, and of those that are cropped or made smaller.

    Args:
        connector: With statistics of training pictures.
        tokens_BLC: Of the understanding encoder.
        pictures: As they were given.
        side: Pixels on each side that are read.
        stacklevel: Frames to the caller of the pipeline.
        result: Pixels on each side of the result; None is `side`.
    """
    size = "that size" if result in (None, side) else f"{result} x {result}"
    lines = []
    if any(are_outside(connector, tokens_BLC) or ()):
        lines.append(
            "the picture is unlike those that the model was trained on; it will see something else in it, and the "
            "result will not resemble it"
        )
    notes = [note for picture in pictures for note in size_notes(picture.size, side)]
    for line in dict.fromkeys(lines + [f"{note}, and the result has {size}" for note in notes]):
        warnings.warn(line, stacklevel=stacklevel + 1)
