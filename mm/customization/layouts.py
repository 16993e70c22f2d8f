"""Which of the base's pictures gives the subjects their places (`mm.customization.apart`).

Where the base draws its things close to each other, the boxes around them share cells, and a subject is cut off where
the other one's place begins. So the base draws several pictures, and the one is taken whose things have most space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from mm.customization.apart_base import Base
from mm.customization.places import Box

_FIRST, _FURTHER = 6, 2  # pictures of the base for the first one that is taken, and for each further one
_SPACIOUS = 0.3  # crowding below which no further picture is drawn
_EDGE = 1 / 16  # of the picture, that things should have between and around them
_LARGE = 0.25  # area from which a thing leaves too little to the others
_SHARED, _NEAR, _OVER, _CUT = 2.0, 1.0, 4.0, 0.15  # weights


class Layouts:
    """Pictures of the base, those with most space first.

    Args:
        draw: the base's picture with a number, from 0.
    """

    def __init__(self, draw: Callable[[int], Base]) -> None:
        self.draw = draw
        self._drawn = 0
        self._left: list[tuple[float, Base]] = []

    def next(self) -> Base:
        """The picture with most space of those that were not given before.

        Pictures are drawn until one has space enough, at most six for the first one and two for each further one.
        """
        for _ in range(_FURTHER if self._drawn else _FIRST):
            if self._left and self._left[0][0] < _SPACIOUS:
                break
            base = self.draw(self._drawn)
            self._drawn += 1
            self._left.append((crowding(list(base.places.values())), base))
            self._left.sort(key=lambda each: each[0])  # stable, so that earlier pictures come first
        return self._left.pop(0)[1]


def crowding(boxes: Sequence[Box]) -> float:
    """How little space things leave each other: 0 for small ones with space between and around them.

    It adds up what two boxes share, what they share with an edge around them, what is large, and what the picture's
    edges may cut off.
    """
    total = 0.0
    for one, other in combinations(boxes, 2):
        total += _SHARED * one.overlap(other) + _NEAR * one.grown(_EDGE).overlap(other.grown(_EDGE))
    for box in boxes:
        total += _OVER * max(0.0, box.area - _LARGE) + _CUT * box.edges
    return total
