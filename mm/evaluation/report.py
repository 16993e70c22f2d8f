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

from mm.core.files import json_bytes, write_bytes, write_files

_FRAMES = {True: (40, 160, 70), False: (205, 50, 45), None: (190, 190, 190)}


def write_report(path: str | Path, report: Mapping[str, Any], grid: bytes | None = None) -> None:
    """Writes a report as JSON and its picture grid beside it, both or neither; files that are there are replaced.

    Where that fails the report is printed, since what it holds may have taken hours.

    Args:
        path: the JSON file.
        report: plain values.
        grid: a PNG, whose file has the name of the report with the suffix `.png`.

    Raises:
        OSError: for a file system that refuses one of them.
    """
    grids = {} if grid is None else {Path(path).with_suffix(".png"): grid}
    try:
        write_files({Path(path): json_bytes(report), **grids})
    except OSError:
        print(json.dumps(report, ensure_ascii=False), flush=True)
        raise


def save_grid(
    path: str | Path, pictures_BCHW: torch.Tensor, labels: Sequence[str], verdicts: Sequence[bool | None]
) -> None:
    """Writes a grid as `grid_png` makes it, whole or not at all. A file that is there is replaced."""
    write_bytes(path, grid_png(pictures_BCHW, labels, verdicts))


def grid_png(
    pictures_BCHW: torch.Tensor, labels: Sequence[str], verdicts: Sequence[bool | None], columns: int = 8
) -> bytes:
    """uint8 pictures with their prompt below and a green or red frame (grey: not judged), as one PNG."""
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
    return out.getvalue()
