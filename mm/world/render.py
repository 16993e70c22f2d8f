"""The renderer: scenes to pictures, in batched torch on whatever device trains.

Design choices
- Sprites come from one shipped sheet, resized once to every size in `SIZES`; a scene is integer-placed patches, blended
  in order, so that drawing is a gather, a blend and a scatter per sprite slot for the whole batch.
- A tint keeps a sprite's shading: its brightness, centred per object, runs from black through the tint to white.
- `cell_labels` gives, for each 16-pixel cell, which object covers most of it: supervision for latents and features.

- Pictures of twice the side (`scale` 2) show the same scene with more detail. The sheet's cells have 64 pixels, so that
  sprites of more than that are enlarged.

Legend: B scenes, S sprite slots, P = 60 patch side times the scale, N flattened pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mm.world import vocabulary as v
from mm.world.scene import SIZES, Scene
from mm.world.styles import apply_style, backgrounds

_SHEET = Path(__file__).parent / "sprites" / "sheet.png"
_COLUMNS = 8
_CELL = 64
_PATCH = max(SIZES)
_PAD = _PATCH // 2  # the canvas is padded so that patches near the border never wrap
_OBJECT = {name: i for i, name in enumerate(v.ALL_OBJECTS)}
_COLOUR = {name: i + 1 for i, name in enumerate(v.COLOURS)}  # 0 = natural


@lru_cache(maxsize=4)
def _atlas(device: str, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sprites (O, sizes, 4, P, P) with premultiplied alpha, and each object's mean brightness (O,)."""
    sheet = np.asarray(Image.open(_SHEET, formats=["PNG"]).convert("RGBA"), dtype=np.float32) / 255
    n = len(v.ALL_OBJECTS)
    cells = torch.from_numpy(sheet).view(-1, _CELL, _COLUMNS, _CELL, 4)
    cells_O4HW = cells.permute(0, 2, 4, 1, 3).reshape(-1, 4, _CELL, _CELL)[:n].clone()
    cells_O4HW[:, :3] *= cells_O4HW[:, 3:]
    layers = []
    for size in (scale * size for size in SIZES):
        small = F.interpolate(cells_O4HW, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        before = (scale * _PATCH - size) // 2
        after = scale * _PATCH - size - before
        layers.append(F.pad(small, (before, after, before, after)))
    rgb, alpha = cells_O4HW[:, :3], cells_O4HW[:, 3:]
    bright = (rgb * rgb.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(1, keepdim=True)
    mean_O = bright.sum((1, 2, 3)) / alpha.sum((1, 2, 3))
    return torch.stack(layers, 1).to(device), mean_O.to(device)


@lru_cache(maxsize=4)
def _tints(device: str) -> torch.Tensor:
    return torch.tensor([(0.0, 0.0, 0.0), *(v.COLOUR_RGB[c] for c in v.COLOURS)], device=device)


def _tint(patch_B4PP: torch.Tensor, mean_B: torch.Tensor, colour_B: torch.Tensor, tints: torch.Tensor) -> torch.Tensor:
    """Recolours premultiplied patches; colour 0 leaves them natural."""
    rgb, alpha = patch_B4PP[:, :3], patch_B4PP[:, 3:]
    bright = (rgb * rgb.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(1, keepdim=True)
    bright = bright / alpha.clamp_min(1e-3)
    # A power that sends the object's mean brightness to one half: the mean then wears the pure tint.
    power = (torch.log(torch.tensor(0.5)) / torch.log(mean_B.clamp(0.05, 0.95))).view(-1, 1, 1, 1)
    level = bright.clamp(1e-4, 1) ** power
    tint = tints[colour_B].view(-1, 3, 1, 1)
    dark = tint * (0.25 + 1.5 * level)
    light = tint + (1 - tint) * 0.75 * (2 * level - 1)
    recoloured = torch.where(level < 0.5, dark, light) * alpha
    return torch.where((colour_B > 0).view(-1, 1, 1, 1), recoloured, rgb)


def _slots(scenes: Sequence[Scene]) -> torch.Tensor:
    """(S, B, 5) of object, size index, colour, left, top; empty slots have object -1."""
    depth = max((len(s.sprites) for s in scenes), default=0)
    table = torch.full((depth, len(scenes), 5), -1, dtype=torch.int64)
    for b, scene in enumerate(scenes):
        for i, s in enumerate(scene.sprites):
            colour = 0 if s.colour is None else _COLOUR[s.colour]
            # With the canvas padded by half a patch, the patch's left edge is the sprite's centre coordinate.
            table[i, b] = torch.tensor((_OBJECT[s.object], SIZES.index(s.size), colour, s.x, s.y))
    return table


def compose(scenes: Sequence[Scene], device: str = "cpu", scale: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Sprites over backgrounds before styling: rgb (B, 3, H, W) and coverage (B, 1, H, W), in [0, 1].

    H = W = 128 times `scale`.
    """
    pad = scale * _PAD
    wide = scale * v.SIZE + 2 * pad
    ground = torch.tensor([v.BACKGROUNDS.index(s.background) for s in scenes], device=device)
    canvas = F.pad(backgrounds(device, scale)[ground], (pad,) * 4)
    canvas = torch.cat([canvas, torch.zeros_like(canvas[:, :1])], 1).flatten(2)
    atlas, mean_O = _atlas(device, scale)
    tints = _tints(device)
    steps = torch.arange(scale * _PATCH, device=device)
    window = (steps[:, None] * wide + steps).flatten()
    for slot in _slots(scenes).to(device):
        rows = torch.nonzero(slot[:, 0] >= 0).flatten()
        obj, size, colour, left, top = slot[rows].unbind(1)
        patch = atlas[obj, size]
        rgb = _tint(patch, mean_O[obj], colour, tints).flatten(2)
        alpha = patch[:, 3:].flatten(2)
        where = ((scale * (top * wide + left))[:, None] + window).unsqueeze(1).expand(-1, 4, -1)
        under = canvas[rows]
        over = torch.gather(under, 2, where) * (1 - alpha) + torch.cat([rgb, alpha], 1)
        canvas[rows] = under.scatter(2, where, over)
    canvas = canvas.view(-1, 4, wide, wide)[:, :, pad:-pad, pad:-pad]
    return canvas[:, :3], canvas[:, 3:]


@torch.no_grad()
def render(scenes: Sequence[Scene], device: str = "cpu", *, scale: int = 1) -> torch.Tensor:
    """Pictures of `scenes`: uint8 (B, 3, H, W), H = W = 128 times `scale`."""
    rgb, alpha = compose(scenes, device, scale)
    out = torch.empty_like(rgb)
    for style in {s.style for s in scenes}:
        rows = torch.tensor([i for i, s in enumerate(scenes) if s.style == style], device=device)
        out[rows] = apply_style(style, rgb[rows], alpha[rows], scale)
    return (out * 255).round().to(torch.uint8)


def cell_labels(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Per 16-pixel cell the covering object and its colour, int64 (B, 8, 8) each.

    0 = nothing. Objects: index in `ALL_OBJECTS` + 1. Colours: 1 = natural, index in `COLOURS` + 2 = tinted. A cell
    belongs to the sprite whose box covers most of it, if that is at least a quarter.
    """
    side = v.SIZE // v.CELL
    objects = torch.zeros(len(scenes), side, side, dtype=torch.int64)
    colours = torch.zeros_like(objects)
    edge = np.arange(side) * v.CELL
    for b, scene in enumerate(scenes):
        best = np.full((side, side), 0.25)
        for s in scene.sprites:
            cover = [
                np.clip(np.minimum(edge + v.CELL, c + s.size / 2) - np.maximum(edge, c - s.size / 2), 0, None) / v.CELL
                for c in (s.y, s.x)
            ]
            area = np.outer(*cover)
            wins = torch.from_numpy(area > best)
            best = np.maximum(best, area)
            objects[b][wins] = _OBJECT[s.object] + 1
            colours[b][wins] = 1 if s.colour is None else _COLOUR[s.colour] + 1
    return objects, colours


def centre_labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Per 16-pixel cell the object whose centre lies in it, int64 (B, 8, 8): 0 = none, else as in `cell_labels`.

    No two sprites of a scene share a cell, nor a square of two by two cells with even corner: they would overlap.
    """
    side = v.SIZE // v.CELL
    out = torch.zeros(len(scenes), side, side, dtype=torch.int64)
    for b, scene in enumerate(scenes):
        for s in scene.sprites:
            out[b, s.y // v.CELL, s.x // v.CELL] = _OBJECT[s.object] + 1
    return out
