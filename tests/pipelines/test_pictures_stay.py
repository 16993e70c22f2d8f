"""mm-tiny draws the pictures that are stored in tests/data: eight seeds in both modes, every second column of pixels.

`python tests/pipelines/test_pictures_stay.py` writes them again, after new weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm import TextToImagePipeline

STORED = Path(__file__).parents[1] / "data"
PROMPTS = (
    *("two red cats on grass", "three blue stars, neon style", "a dog left of a tree, sketch style", "a pink rocket"),
    *("an owl, sketch style", "one yellow key, pixel art style", "a bus, blueprint style", "a castle, pixel art style"),
)
STEPS = {"flow": 8, "codes": 12}


def drawn(mode: str) -> np.ndarray:
    """Eight pictures (8, H, W / 2, 3) as bytes, of seeds 0 to 7."""
    pipe = TextToImagePipeline.from_pretrained("mm-tiny")
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(k) for k in range(8)]
    pictures = pipe(list(PROMPTS), mode=mode, num_inference_steps=STEPS[mode], generator=seeds).images
    return np.stack([np.asarray(picture)[:, ::2] for picture in pictures])


@pytest.mark.parametrize("mode", STEPS)
def test_the_pictures_are_the_stored_ones(mode: str) -> None:
    sheet = np.asarray(Image.open(STORED / f"pictures-{mode}.png"), dtype=int)
    stored = np.stack(np.split(sheet, 8, axis=1))
    difference = np.abs(drawn(mode).astype(int) - stored).max((1, 2, 3))
    if mode == "flow":
        assert difference.max() <= 2, difference
    else:  # a code whose two best logits are equal to the last bit may be another one on another machine
        assert (difference <= 2).sum() >= 6, difference


if __name__ == "__main__":
    for name in STEPS:
        sheet = Image.fromarray(np.concatenate(list(drawn(name)), axis=1))
        sheet.save(STORED / f"pictures-{name}.png", optimize=True)
