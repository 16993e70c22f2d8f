"""Common concepts among which neighbours and anchors of a target are searched, in models that know plain English."""

from __future__ import annotations

COMMON_NAMES: tuple[str, ...] = tuple(
    """
    animal vehicle fruit food building plant tool person furniture instrument toy cat dog wolf fox bear lion tiger horse
    cow sheep pig rabbit mouse elephant monkey bird owl eagle duck penguin fish shark whale turtle frog snake spider
    butterfly bee car truck bus train bicycle motorcycle airplane helicopter boat ship rocket apple orange banana lemon
    strawberry tomato carrot bread cake pizza cheese egg coffee wine house castle church bridge tower tent tree flower
    rose sunflower grass mushroom mountain river beach chair table bed lamp sofa clock book pen knife hammer phone
    computer television camera guitar violin piano drum hat shirt dress shoe ring crown umbrella bag key ball kite
    balloon doll robot star moon sun cloud snow fire woman man child baby king soldier doctor
    """.split()
)
