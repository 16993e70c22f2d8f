"""Pictures of other programs that are to be drawn again: what of their settings acts otherwise here, or not at all.

Design choices
- Seeds of ComfyUI have 64 bits, those of mm 32: the last 32 bits are taken. The noise differs in any case.
- What changed the picture there and has no name here is named, and the rest is drawn: a like picture was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.core.checks import MAX_SEED

# Settings under "other" that change a picture; for some the value that changes nothing
_ACTING = {
    "Clip skip": ("1",),
    "Denoising strength": ("1",),
    "denoise": (1, 1.0),
    "Hires upscale": (),
    "Refiner": (),
    "Variation seed": (),
    "Token merging ratio": ("0",),
}
_SCHEDULES = ("karras", "exponential", "polyexponential", "sgm_uniform", "beta")


def fitting_seed(seed: Any, notes: list[str]) -> Any:
    """A seed as mm takes it; None for the mark of another program that a seed was drawn by chance.

    Args:
        seed: of the picture.
        notes: gets a line where the seed is another one.
    """
    if type(seed) is not int or 0 <= seed <= MAX_SEED:
        return seed
    if seed < 0:
        notes.append(f"the picture's seed is {seed}, so it is not known; another one is drawn")
        return None
    made = seed & MAX_SEED
    notes.append(f"the picture's seed {seed} is larger than {MAX_SEED}; its last 32 bits are taken, {made}")
    return made


def left_out(settings: Mapping[str, Any]) -> list[str]:
    """Lines on what made the picture and does not act here.

    Args:
        settings: as `mm.core.png_settings.read_settings` gives them.
    """
    other = settings.get("other")
    other = other if isinstance(other, Mapping) else {}
    acting = [f"{key} {other[key]}" for key, idle in _ACTING.items() if key in other and other[key] not in idle]
    words = f"{settings.get('sampler') or ''} {settings.get('scheduler') or ''} {other.get('Schedule type') or ''}"
    acting += [f"the noise schedule {name}" for name in _SCHEDULES if name in words.lower().split()]
    lines = [f"left out of the picture's settings: {', '.join(acting)}"] if acting else []
    loras = other.get("loras")
    for name in loras if isinstance(loras, list) else ():
        lines.append(f"the picture was drawn with the LoRA {name}; give --lora FILE:SCALE")
    return lines
