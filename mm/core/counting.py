"""Numbers of things in messages."""

from __future__ import annotations


def counted(count: int, one: str, several: str = "") -> str:
    """A number with its noun: "1 layer", "3 layers".

    Args:
        count: how many.
        one: the noun for one, which may have words before it: "training picture".
        several: the noun for any other number; empty adds an s.
    """
    return f"{count} {one if count == 1 else several or one + 's'}"
