"""Calibration prompts for models that draw anything: subjects, media, light and lettering of many kinds."""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "a lighthouse on a cliff in a storm, oil painting",
    "portrait of an old fisherman, soft window light",
    "a bowl of ramen with steam, food photography",
    "a red bicycle leaning on a stone wall",
    "an astronaut walking through a field of sunflowers",
    "isometric drawing of a small bookshop at night",
    "a hummingbird in flight, macro photograph",
    "snowy mountains behind a quiet lake at dawn",
    "a cat sleeping on a pile of folded laundry",
    "a street market in the rain, neon signs, reflections",
    "watercolor of a sailing boat in a harbour",
    "a chess board made of glass, studio lighting",
    "children's book drawing of a fox and an owl",
    "a steam train crossing a viaduct in autumn",
    "a poster that says HELLO in bold letters",
    "an empty theatre with velvet seats",
)


def general(count: int, seed: int = 0) -> list[str]:
    """`count` of the prompts above, at most all of them; `seed` says where to begin, 0 = at the first."""
    start = seed % len(PROMPTS)
    return list((PROMPTS[start:] + PROMPTS[:start])[:count])
