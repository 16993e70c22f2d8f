"""Styles that no model has learned: their pictures, and a measure of how far drawn pictures have them.

Design choices
- A style is a formula on rendered pictures, so that true pictures of any scene exist.
- The judge does not know these styles. A picture has a style where its colours and gradients are nearer to those of
  true pictures in that style than to those in any of the world's own styles (the moments that Gatys et al. 2016,
  arXiv 1508.06576, match, of fixed filters instead of a network's). The same measure on true pictures of other scenes
  gives its ceiling.
- Objects are read after the formula has been undone, as far as it can be: the judge then reads a style that it knows.

Legend: B pictures, F features, C styles.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mm.core.files import write_text
from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.render import render
from mm.world.scene import Scene, Sprite, stops
from mm.world.styles import apply_style, edges, luma

TAUGHT: tuple[str, ...] = ("cat", "car", "tree", "apple", "clock")  # in the training pictures
ASKED: tuple[str, ...] = ("dog", "boat", "mushroom", "key", "owl", "pizza", "castle", "star")  # in the prompts
_REFERENCES = 24  # true pictures of a style


def _negative(rgb_B3HW: Tensor) -> Tensor:
    return 1 - rgb_B3HW


def _inks(like: Tensor) -> tuple[Tensor, Tensor]:
    dark, bright = (like.new_tensor(x).view(1, 3, 1, 1) for x in ((0.10, 0.05, 0.35), (1.0, 0.55, 0.75)))
    return dark, bright - dark


def _duotone(rgb_B3HW: Tensor) -> Tensor:
    dark, across = _inks(rgb_B3HW)
    return dark + luma(rgb_B3HW) * across


def _sepia_of_duotone(rgb_B3HW: Tensor) -> Tensor:
    dark, across = _inks(rgb_B3HW)
    bright_B1HW = ((rgb_B3HW - dark) * across).sum(1, keepdim=True) / across.square().sum()
    return apply_style("sepia", bright_B1HW.expand(-1, 3, -1, -1), torch.ones_like(bright_B1HW))


# Each style's formula, and what brings its pictures into a style that the judge reads.
UNSEEN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "negative": (_negative, _negative), "duotone": (_duotone, _sepia_of_duotone),
}  # fmt: skip


def _changed(change: Callable[[Tensor], Tensor], pictures_B3HW: Tensor) -> Tensor:
    return (change(pictures_B3HW.float() / 255).clamp(0, 1) * 255).round().to(torch.uint8)


def in_style(style: str, scenes: Sequence[Scene]) -> Tensor:
    """True pictures (B, 3, 128, 128), uint8, of scenes in an unseen style."""
    return _changed(UNSEEN[style][0], render(scenes))


def undone(style: str, pictures_B3HW: Tensor) -> Tensor:
    """Pictures (uint8) without the style, so that the judge can read their objects."""
    return _changed(UNSEEN[style][1], pictures_B3HW)


def scenes_of_objects(names: Sequence[str], seed: str) -> list[Scene]:
    """One scene an object, at varied places, in the default style; backgrounds in turn."""
    rng = random.Random(f"customize styles {seed}")
    scenes = []
    for number, name in enumerate(names):
        size = rng.choice((44, 52, 60))
        sprite = Sprite(object=name, x=rng.choice(stops(size)), y=rng.choice(stops(size)), size=size)
        scenes.append(Scene(sprites=(sprite,), background=v.BACKGROUNDS[number % len(v.BACKGROUNDS)]))
    return scenes


def write_style(folder: Path, style: str) -> Path:
    """The training pictures of a style, with captions that name what they show beside the style."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of_objects(TAUGHT, f"taught {style}")
    for number, (scene, picture) in enumerate(zip(scenes, in_style(style, scenes), strict=True)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        name = scene.sprites[0].object
        phrase = c.BACKGROUND_PHRASES[scene.background][0]
        write_text(folder / f"{number}.txt", f"{c.article(name)} {name} {phrase}, [trigger] style\n")
    return folder


def style_prompts(style: str) -> list[tuple[str, str]]:
    """Prompts (text, object) in a style, on objects and words that the training pictures do not show."""
    return [
        (f"{c.article(name)} {name} {c.BACKGROUND_PHRASES[ground][1]}, <{style}> style", name)
        for number, name in enumerate(ASKED)
        for ground in [v.BACKGROUNDS[number % len(v.BACKGROUNDS)]]
    ]


def moments(pictures_B3HW: Tensor) -> Tensor:
    """Features (B, F): means and covariances of red, green, blue and the gradient's size over a picture."""
    rgb = pictures_B3HW.float() / 255
    maps_BKP = torch.cat([rgb, edges(rgb)], 1).flatten(2)
    mean_BK = maps_BKP.mean(2)
    apart = maps_BKP - mean_BK[..., None]
    cov_BKK = apart @ apart.transpose(1, 2) / maps_BKP.shape[2]
    upper = torch.triu_indices(4, 4)
    return torch.cat([mean_BK, cov_BKK[:, upper[0], upper[1]]], 1)


class StyleReader:
    """Names the style of pictures: that of the nearest true ones, under the features' own spreads within a style.

    Args:
        style: the unseen style beside the world's own.
    """

    def __init__(self, style: str) -> None:
        rng = random.Random("customize styles reference")
        names = [rng.choice(v.OBJECTS) for _ in range(_REFERENCES)]
        scenes = scenes_of_objects(names, "reference")
        known = [[Scene(sprites=s.sprites, background=s.background, style=kind) for s in scenes] for kind in v.STYLES]
        each = [moments(in_style(style, scenes)), *(moments(render(one)) for one in known)]
        self.names = (style, *v.STYLES)
        self.references_CBF = torch.stack(each)
        within = self.references_CBF - self.references_CBF.mean(1, keepdim=True)
        self.spread_F = within.square().mean((0, 1)).sqrt().clamp_min(1e-4)

    def read(self, pictures_B3HW: Tensor) -> list[str]:
        """The style of each picture (uint8), by its nearest reference."""
        found_BF = moments(pictures_B3HW) / self.spread_F
        flat = (self.references_CBF / self.spread_F).flatten(0, 1)
        nearest_B = torch.cdist(found_BF, flat).argmin(1) // self.references_CBF.shape[1]
        return [self.names[int(k)] for k in nearest_B]
