"""Draws docs/pictures/world.png: true renders of the world, one row a style.

python examples/world_sheet.py docs/pictures/world.png
"""

from __future__ import annotations

import argparse
import random

import torch
from PIL import Image

from mm.world.render import render
from mm.world.scene import sample_scene
from mm.world.vocabulary import STYLES


def main(path: str, columns: int = 8) -> None:
    """Writes the sheet to `path`."""
    rng = random.Random(20)
    rows = [torch.cat(list(render([sample_scene(rng, styles=[s]) for _ in range(columns)])), 2) for s in STYLES]
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy()).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", help="the picture to write")
    main(parser.parse_args().path)
