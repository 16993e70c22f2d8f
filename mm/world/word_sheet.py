"""A sheet of little pictures of what the world holds: every object, background and style with its word."""

from __future__ import annotations

from PIL import Image, ImageDraw

from mm.world import vocabulary as v
from mm.world.render import render
from mm.world.scene import Scene, Sprite

_SIDE, _TEXT, _COLUMNS = v.SIZE // 2, 14, 10


def word_pictures() -> list[tuple[Image.Image, str]]:
    """A picture (64, 64) of each object, colour, background and style, with its word."""
    cells = [(name, _scene(name)) for name in v.OBJECTS]
    cells += [(name, _scene("star", colour=name)) for name in v.COLOURS]
    cells += [(name, _scene("house", background=name)) for name in v.BACKGROUNDS]
    cells += [(name, _scene("cat", style=name)) for name in v.STYLES]
    pictures = render([scene for _, scene in cells])
    return [
        (Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), name)
        for (name, _), picture in zip(cells, pictures, strict=True)
    ]


def sheet() -> Image.Image:
    """All of them in rows of ten."""
    cells = word_pictures()
    rows = -(-len(cells) // _COLUMNS)
    made = Image.new("RGB", (_COLUMNS * _SIDE, rows * (_SIDE + _TEXT)), "white")
    pen = ImageDraw.Draw(made)
    for k, (picture, name) in enumerate(cells):
        x, y = k % _COLUMNS * _SIDE, k // _COLUMNS * (_SIDE + _TEXT)
        made.paste(picture, (x, y))
        pen.text((x + 3, y + _SIDE), name, fill="black")
    return made


def _scene(name: str, *, colour: str | None = None, background: str = "plain", style: str = v.DEFAULT_STYLE) -> Scene:
    sprite = Sprite(object=name, colour=colour, x=v.SIZE // 2, y=v.SIZE // 2, size=60)
    return Scene(sprites=(sprite,), background=background, style=style)
