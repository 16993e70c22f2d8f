"""Which of the base's pictures gives the subjects their places."""

from __future__ import annotations

import pytest
from PIL import Image

from mm.customization.apart_base import Base
from mm.customization.layouts import Layouts, crowding
from mm.customization.places import Box


def box(left: float, top: float, side: float) -> Box:
    return Box(left=left, top=top, right=left + side, bottom=top + side)


SPACIOUS = [box(0.1, 0.1, 0.3), box(0.6, 0.6, 0.3)]
NEAR = [box(0.1, 0.1, 0.3), box(0.45, 0.1, 0.3)]
SHARED = [box(0.1, 0.1, 0.4), box(0.3, 0.1, 0.4)]
CUT = [box(0.0, 0.1, 0.3), box(0.7, 0.7, 0.3)]  # three of its edges are the picture's


def layouts_of(*numbered: list[Box]) -> tuple[Layouts, list[int]]:
    """Layouts of pictures with these places, and the numbers of those that were drawn."""
    drawn: list[int] = []

    def draw(number: int) -> Base:
        drawn.append(number)
        places = dict(zip("ab", numbered[number], strict=True))
        return Base(
            picture=Image.new("RGB", (8, 8)), latents=[], timesteps=[], seed=number, things={}, other="", places=places
        )  # fmt: skip

    return Layouts(draw), drawn


def test_crowding_counts_what_is_shared_near_large_or_cut_off() -> None:
    assert crowding(SPACIOUS) == 0
    assert crowding(NEAR) == pytest.approx(0.075 * 0.425 / 0.425**2)  # boxes with an edge of 1/16 share this
    assert crowding(SHARED) > 2 * 0.5 and crowding(CUT) == pytest.approx(3 * 0.15)
    assert crowding([box(0.1, 0.1, 0.7)]) == pytest.approx(4 * (0.49 - 0.25))
    assert crowding([*SPACIOUS, box(0.6, 0.1, 0.3)]) == 0  # three with space
    assert crowding(NEAR) < 0.3 < crowding(CUT) < crowding(SHARED)


def test_the_first_picture_with_space_is_taken() -> None:
    layouts, drawn = layouts_of(SHARED, CUT, SPACIOUS, SPACIOUS)
    assert layouts.next().seed == 2 and drawn == [0, 1, 2]


def test_of_six_crowded_pictures_the_least_crowded_one_is_taken() -> None:
    layouts, drawn = layouts_of(SHARED, SHARED, CUT, SHARED, CUT, SHARED, SHARED, SHARED, NEAR)
    assert layouts.next().seed == 2 and drawn == list(range(6))
    assert layouts.next().seed == 4 and drawn == list(range(8))  # one that was drawn before
    assert layouts.next().seed == 8 and drawn == list(range(9))
