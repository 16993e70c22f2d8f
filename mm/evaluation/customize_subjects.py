"""The subjects of `mm eval customize`: pictures to learn from, and prompts with what they demand.

Design choices
- The subjects are the objects that no model was trained on. Each has five pictures on five backgrounds; a sixth
  background is kept for the prompts.
- Prompts for choosing settings (`tuning`) and for reporting differ in wording and seeds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mm.core.files import write_text
from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.judge import Reading
from mm.world.render import render
from mm.world.scene import Scene, Sprite, stops

GROUNDS: tuple[str, ...] = ("grass", "beach", "snow", "sky", "night")
COMPANIONS: tuple[str, ...] = ("cat", "car", "tree", "apple", "house", "star", "fish", "clock")
STYLES: tuple[str, ...] = ("watercolor", "sepia", "mosaic", "sketch")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt, with `{}` in the subject's place, and what its picture must show."""

    text: str
    background: str | None = None
    style: str | None = None
    companion: str | None = None


def scenes_of(subject: str, grounds: tuple[str, ...] = GROUNDS) -> list[Scene]:
    """One scene a background: the subject alone, at varied places and sizes."""
    rng = random.Random(f"customize {subject} {' '.join(grounds)}")
    scenes = []
    for ground in grounds:
        size = rng.choice((44, 52, 60))
        x, y = rng.choice(stops(size)), rng.choice(stops(size))
        scenes.append(Scene(sprites=(Sprite(object=subject, x=x, y=y, size=size),), background=ground))
    return scenes


def write_pictures(
    folder: Path, subject: str, grounds: tuple[str, ...] = GROUNDS, *, captions: bool = True
) -> Path:  # fmt: skip
    """The training pictures of a subject, with captions that name the background, or without captions."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(subject, grounds)
    for number, (scene, picture) in enumerate(zip(scenes, render(scenes), strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        if captions:
            phrase = c.BACKGROUND_PHRASES[scene.background][0]
            write_text(folder / f"{number}.txt", f"a [trigger] {phrase}\n")
    return folder


def asks(*, tuning: bool = False) -> list[Ask]:
    """The prompts: the subject alone, on each background, in styles, and beside another object."""
    pick = 2 if tuning else 1
    out = [Ask(text="a {}"), Ask(text="a photo of a {}")]
    for ground in v.BACKGROUNDS:
        out.append(Ask(text=f"a {{}} {c.BACKGROUND_PHRASES[ground][pick]}", background=ground))
    for style in STYLES:
        out.append(Ask(text=f"{c.STYLE_BEFORE[style][0]} a {{}}", style=style))
    for number, other in enumerate(COMPANIONS[:: 2 if tuning else 1]):
        relation = v.RELATIONS[number % 4]
        text = f"{_a(other)} {c.RELATION_PHRASES[relation][0]} a {{}}" if number % 2 else f"a {{}} and {_a(other)}"
        out.append(Ask(text=text, companion=other))
    return out


def _a(word: str) -> str:
    return f"{c.article(word)} {word}"


def shows(reading: Reading, subject: str) -> bool:
    """Whether a picture shows the subject."""
    return reading.readable and any(found.object == subject for found in reading.objects)


def follows(reading: Reading, ask: Ask) -> bool | None:
    """Whether a picture shows what the prompt asks for beside the subject; None where it asks for nothing else."""
    wanted = [
        reading.background == ask.background if ask.background else None,
        reading.style == ask.style if ask.style else None,
        any(found.object == ask.companion for found in reading.objects) if ask.companion else None,
    ]
    asked = [value for value in wanted if value is not None]
    return all(asked) and reading.readable if asked else None


def true_scenes(subject: str, prompts: list[Ask]) -> list[Scene]:
    """Scenes that the prompts describe, for the judge's ceiling."""
    rng = random.Random(f"customize ceiling {subject}")
    scenes = []
    for ask in prompts:
        style = ask.style or v.DEFAULT_STYLE
        ground = ask.background or ("plain" if not v.shows_background(style) else rng.choice(v.BACKGROUNDS))
        size = max(44, v.smallest_sprite(style))
        sprites: tuple[Sprite, ...] = (Sprite(object=subject, x=32, y=64, size=size),)
        if ask.companion:
            sprites = (*sprites, Sprite(object=ask.companion, x=96, y=64, size=size))
        scenes.append(Scene(sprites=sprites, background=ground, style=style))
    return scenes
