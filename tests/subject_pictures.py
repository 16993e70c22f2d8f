"""Folders of pictures to learn from, for tests of customization."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

WORDS = ("sks", "zwx")  # what two subjects are called in prompts


def subject_folder(folder: Path, count: int = 3, *, side: int = 32, captions: bool = True) -> Path:
    """Pictures of one coloured disc on different grounds, each with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = torch.arange(side).float() - side / 2
    disc = (grid[:, None].square() + grid.square()).sqrt() < side / 4
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        ground = torch.randint(0, 256, (3,), generator=generator, dtype=torch.uint8)
        picture = ground.expand(side, side, 3).clone()
        picture[disc] = torch.tensor([220, 30, 60], dtype=torch.uint8)
        Image.fromarray(picture.numpy(), "RGB").save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text("a photo of a [trigger] on grass\n")
    return folder
