"""The picture grid of every report."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from mm.core.files import write_bytes

_FRAMES = {True: (40, 160, 70), False: (205, 50, 45), None: (190, 190, 190)}


def save_grid(
    path: str | Path,
    pictures_BCHW: torch.Tensor,
    labels: Sequence[str],
    verdicts: Sequence[bool | None],
    columns: int = 8,
) -> None:
    """uint8 pictures with their prompt below and a green or red frame (grey: not judged), as one PNG,
    whole or not at all. A file that is there is replaced."""
    side, line = pictures_BCHW.shape[-1], 26
    rows = math.ceil(len(labels) / columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + 8 + line)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, label, ok) in enumerate(zip(pictures_BCHW, labels, verdicts, strict=True)):
        x, y = (i % columns) * (side + 8), (i // columns) * (side + 8 + line)
        pen.rectangle((x + 1, y + 1, x + side + 6, y + side + 6), outline=_FRAMES[ok], width=3)
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (x + 4, y + 4))
        pen.text((x + 4, y + side + 8), label[:24] + "\n" + label[24:48], fill="black", font_size=10)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    write_bytes(path, out.getvalue())
