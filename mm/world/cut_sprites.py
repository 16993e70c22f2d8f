"""Cuts the sprite sheet from Noto Color Emoji, once: `python -m mm.world.cut_sprites FONT.ttf`.

The sheet is shipped, so nobody needs the font to draw. Cells are 64 x 64 RGBA in the order of `ALL_OBJECTS`, eight a
row, each glyph cropped to its ink and scaled so that its longest side is 64.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mm.world.vocabulary import ALL_OBJECTS

CELL = 64
COLUMNS = 8
SHEET = Path(__file__).parent / "sprites" / "sheet.png"
_GLYPHS = "🐱🐯🐶🐺🦊🐻🐰🐸🦉🐧🐦🐟🐬🐢🦋🍎🍅🍌🍕🍰🍩🍄🚗🚌🚲⛵🚀🏠🏰🎸🎻👑☂🕒🔑🌳🌲🌻⭐🌙🐼🤖🎁🏀🌷🌵❤🎈"


def cut(font_path: str) -> Image.Image:
    """The sheet as one RGBA picture."""
    font = ImageFont.truetype(font_path, 109)  # the only size the bitmap font has
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(ALL_OBJECTS) // COLUMNS) * CELL))
    for i, (_, glyph) in enumerate(zip(ALL_OBJECTS, _GLYPHS, strict=True)):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((10, 10), glyph, font=font, embedded_color=True)
        ink = canvas.crop(canvas.getbbox())
        scale = CELL / max(ink.size)
        ink = ink.resize((round(ink.width * scale), round(ink.height * scale)), Image.Resampling.LANCZOS)
        left, top = (i % COLUMNS) * CELL + (CELL - ink.width) // 2, (i // COLUMNS) * CELL + (CELL - ink.height) // 2
        sheet.paste(ink, (left, top))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Cuts the sprites of the world from a font into the package.")
    parser.add_argument("font", help="NotoColorEmoji.ttf")
    found = cut(parser.parse_args().font)
    SHEET.parent.mkdir(exist_ok=True)
    found.save(SHEET, optimize=True)
