"""The file and the picture grid of every report."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from mm.core.files import write_bytes, write_json

_FRAMES = {True: (40, 160, 70), False: (205, 50, 45), None: (190, 190, 190)}


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON; a file that is there is replaced.

    Where that fails the report is printed, since what it holds may have taken hours.

    Raises:
        OSError: for a file system that refuses it.
    """
    try:
        write_json(path, report)
    except OSError:
        print(json.dumps(report, ensure_ascii=False), flush=True)
        raise


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
