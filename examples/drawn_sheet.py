"""Draws docs/pictures/drawn.png: what the embedded model makes of sixteen prompts, first seeds, nothing picked.

python examples/drawn_sheet.py docs/pictures/drawn.png [MODEL]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mm import TextToImagePipeline
from mm.evaluation.report import save_grid

PROMPTS = (
    "a cat",
    "a red apple",
    "two dogs on grass",
    "three blue stars at night",
    "a yellow car on the beach",
    "a penguin in the snow",
    "a purple owl",
    "four bananas",
    "a cat left of a dog",
    "a green house above a red car",
    "a fox and a tree on grass",
    "a pink rocket and a blue fish",
    "two red cats on grass, watercolor style",
    "a guitar, pixel art style",
    "a crown, neon style",
    "a butterfly, sketch style",
)


def main(path: str, model: str = "mm-tiny") -> None:
    """Writes the sheet to `path`."""
    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(k) for k in range(len(PROMPTS))]
    pictures = pipe(list(PROMPTS), generator=generators, output_type="pt").images
    save_grid(Path(path), (pictures * 255).round().to(torch.uint8), PROMPTS, [None] * len(PROMPTS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", help="the picture to write")
    parser.add_argument("model", nargs="?", default="mm-tiny", help="an embedded model, a folder, or a hub name")
    main(**vars(parser.parse_args()))
