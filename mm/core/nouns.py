"""Nouns in messages: with their number, or with "a" or "an"."""

from __future__ import annotations

_SOUNDS_LIKE_YOU = ("uni", "use", "unet", "usu", "eu", "one")  # "a UNet", "a user"; but "an UnusableLayer"
_SAID_OTHERWISE = ("unin", "unim")  # "an unintended"


def counted(count: int, one: str, several: str = "") -> str:
    """A number with its noun: "1 layer", "3 layers".

    Args:
        count: how many.
        one: the noun for one, which may have words before it: "training picture".
        several: the noun for any other number; empty adds an s.
    """
    return f"{count} {one if count == 1 else several or one + 's'}"


def with_article(noun: str) -> str:
    """A noun with "a" or "an": "a picture", "an adapter", "a UNet", "an int"."""
    low = noun.lower()
    vowel = low[:1] in tuple("aeiou")
    as_you = low.startswith(_SOUNDS_LIKE_YOU) and not low.startswith(_SAID_OTHERWISE)
    return f"{'an' if vowel and not as_you else 'a'} {noun}"
