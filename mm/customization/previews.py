"""What a run shows while it works: a plot of its losses and scores, and sample pictures."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from mm.core.files import write_bytes
from mm.customization.run_state import Progress
from mm.families.frames import one_frame, pictures_of
from mm.families.sizes import exact_size
from mm.families.sources import plain_sources
from mm.families.wording import as_written

_SIZE = (640, 320)
_EDGE = 40


def plot(progress: Progress) -> bytes:
    """A PNG: the pictures' loss (blue, smoothed), the preservation (grey) and the preview scores (green)."""
    sheet = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(sheet)
    width, height = _SIZE[0] - 2 * _EDGE, _SIZE[1] - 2 * _EDGE
    pen.rectangle((_EDGE, _EDGE, _EDGE + width, _EDGE + height), outline=(190, 190, 190))
    steps = max(1, progress.step)

    def line(points: Sequence[tuple[float, float]], top: float, colour: tuple[int, int, int]) -> None:
        spots = [
            (_EDGE + width * x / steps, _EDGE + height * (1 - min(1.0, max(0.0, y / top if top else 0.0))))
            for x, y in points
        ]
        if len(spots) > 1:
            pen.line(spots, fill=colour, width=2)

    smooth = _smoothed(progress.losses)
    top = max(smooth, default=1.0) or 1.0
    line(list(enumerate(smooth, 1)), top, (40, 90, 200))
    line(list(enumerate(_smoothed(progress.preserved), 1)), top, (150, 150, 150))
    line([(step, score) for step, score, _, _ in progress.scores], 1.0, (40, 160, 70))
    best = progress.scores[progress.best][1] if progress.scores else 0.0
    text = f"step {progress.step}   loss {smooth[-1] if smooth else 0:.4f} (top {top:.4f})   best score {best:.3f}"
    pen.text((_EDGE, 12), text, fill="black", font_size=13)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    out: list[float] = []
    for value in values:
        out.append(value if not out else out[-1] + share * (value - out[-1]))
    return out


@torch.no_grad()
def draw(
    pipe: Any, prompt: str, *, side: int, seed: int, steps: int | None = None, source: Image.Image | None = None
) -> Image.Image:  # fmt: skip
    """A picture of a prompt, or of an instruction and a source, drawn by the pipeline as the model is now.

    Without a source, a pipeline that always takes one gets an empty picture, with everything masked.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"output_type": "pil"} | exact_size(takes, side, side)
    given |= one_frame(takes) | as_written(takes)
    if steps is not None:
        given["num_inference_steps"] = steps
    given |= plain_sources(pipe, 1, side) if source is None else {"image": source}
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        made = pipe(
            prompt=prompt, generator=torch.Generator().manual_seed(seed),
            **{key: value for key, value in given.items() if key in takes},
        )  # fmt: skip
    finally:
        pipe.set_progress_bar_config(**quiet)
    picture = pictures_of(made)[0]
    assert isinstance(picture, Image.Image)
    return picture


def sheet_of(pictures: Sequence[Image.Image]) -> Image.Image | None:
    """Pictures side by side; None for no pictures."""
    if not pictures:
        return None
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet


def save_previews(folder: Path, progress: Progress, pictures: Image.Image | None) -> None:
    """Writes `loss.png` and, with pictures, `samples/000100.png`; files that are there are replaced."""
    write_bytes(folder / "loss.png", plot(progress))
    if pictures is not None:
        out = io.BytesIO()
        pictures.save(out, "PNG")
        write_bytes(folder / "samples" / f"{progress.step:06}.png", out.getvalue())
