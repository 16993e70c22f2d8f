"""Parts of pictures, cut out and put elsewhere with soft edges."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageFilter

from mm.customization.places import Box, cells_of

_EDGE = 0.02  # of the picture's width, over which a box fades


def cut(picture: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """The part of a picture in a box, in RGB, scaled to `size` (width, height in pixels)."""
    part = picture.convert("RGB").crop(_pixels(box, *picture.size))
    return part.resize(size, Image.Resampling.LANCZOS)


def pasted(onto: Image.Image, picture: Image.Image, box: Box, place: Box) -> Image.Image:
    """A picture in which the box of another one is at a place, with soft edges."""
    whole = Box(left=0.0, top=0.0, right=1.0, bottom=1.0)
    return covered(onto, picture.convert("RGB").crop(_pixels(box, *picture.size)), place, [whole])


def covered(onto: Image.Image, picture: Image.Image, part: Box, boxes: Sequence[Box]) -> Image.Image:
    """A picture that shows another one in the first of some boxes, with soft edges.

    Args:
        onto: the picture.
        picture: of a part of it, at any size.
        part: which one.
        boxes: of the part. What is nearer to the centre of a further box is not covered.
    """
    left, top, right, bottom = _pixels(part, *onto.size)
    size = (right - left, bottom - top)
    inside_HW = cells_of(boxes, size[1], size[0])[0]
    above, mask = onto.copy(), Image.new("L", onto.size, 0)
    above.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (left, top))
    mask.paste(Image.fromarray((inside_HW * 255).byte().numpy()), (left, top))
    return Image.composite(above, onto, mask.filter(ImageFilter.GaussianBlur(_EDGE * onto.width)))


def _pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    sides = (box.left * width, box.top * height, box.right * width, box.bottom * height)
    left, top, right, bottom = (round(x) for x in sides)
    return left, top, max(right, left + 1), max(bottom, top + 1)
