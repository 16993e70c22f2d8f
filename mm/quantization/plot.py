"""A report as a picture: what each layer lost, before and after, on a logarithmic scale."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from mm.quantization.report import Report

ROW, LEFT, WIDTH, TOP = 12, 300, 520, 44
_BEFORE, _AFTER, _INK, _GRID = (208, 168, 120), (52, 108, 176), (30, 30, 30), (225, 225, 225)


def draw(report: Report) -> Image.Image:
    """One row a layer: rounding to nearest in sand, what was done instead in blue."""
    layers = report.layers
    errors = [e for layer in layers for e in (layer.nearest_error, layer.error) if e > 0]
    low = math.floor(math.log10(min(errors))) if errors else -6
    high = math.ceil(math.log10(max(errors))) if errors else 0
    high = max(high, low + 1)
    image = Image.new("RGB", (LEFT + WIDTH + 70, TOP + ROW * len(layers) + 12), "white")
    pen = ImageDraw.Draw(image)

    def across(error: float) -> float:
        return LEFT + WIDTH * (math.log10(max(error, 10**low)) - low) / (high - low)

    title = (
        f"share of output power lost: nearest (sand), here (blue); {report.ratio:.2f}x smaller, {report.seconds:.0f} s"
    )
    pen.text((8, 6), title, fill=_INK)
    for power in range(low, high + 1):
        x = across(10.0**power)
        pen.line((x, TOP - 4, x, image.height - 8), fill=_GRID)
        pen.text((x - 12, TOP - 18), f"1e{power}", fill=_INK)
    for i, layer in enumerate(layers):
        y = TOP + ROW * i
        pen.text((8, y), layer.path[-46:], fill=_INK)
        if layer.nearest_error > 0:
            pen.rectangle((LEFT, y + 1, across(layer.nearest_error), y + ROW - 3), fill=_BEFORE)
        if layer.error > 0:
            pen.rectangle((LEFT, y + 3, across(layer.error), y + ROW - 5), fill=_AFTER)
        pen.text((LEFT + WIDTH + 8, y), f"{layer.bits} bit", fill=_INK)
    return image
