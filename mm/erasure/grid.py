"""A picture that shows what a model drew before and after an erasure."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

GAP, LINE = 6, 28


def before_after_png(rows: Sequence[tuple[str, Image.Image, Image.Image]], side: int = 128) -> bytes:
    """One PNG: a column for each prompt, the picture before the erasure above the one after it.

    Args:
        rows: prompt, picture before and picture after.
        side: pixels a picture.
    """
    sheet = Image.new("RGB", (max(1, len(rows)) * (side + GAP) + GAP, 2 * (side + GAP) + LINE + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (prompt, before, after) in enumerate(rows):
        x = GAP + k * (side + GAP)
        for j, picture in enumerate((before, after)):
            sheet.paste(picture.convert("RGB").resize((side, side)), (x, GAP + j * (side + GAP)))
        pen.text((x, 2 * (side + GAP) + 2), prompt[:24] + "\n" + prompt[24:48], fill="black", font_size=10)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()
