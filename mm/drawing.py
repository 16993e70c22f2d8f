"""Pictures from a prompt into a folder: what `mm generate` does, for scripts too.

Design choices
- Files are numbered on from what is there; nothing is ever overwritten, and each appears whole or not at all.
- Every picture carries its own seed, so that any single one can be drawn again.

This module does not know the command line.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

from mm.metadata import save_png


def free_paths(folder: Path, count: int) -> list[Path]:
    """`count` file names 00000.png, 00001.png, ... after the last one in `folder`."""
    taken = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdigit()]
    first = max(taken, default=-1) + 1
    return [folder / f"{first + k:05d}.png" for k in range(count)]


def draw_to_folder(
    prompt: str,
    folder: Path,
    *,
    count: int = 1,
    seed: int | None = None,
    steps: int = 12,
    mode: str = "flow",
    guidance: float = 4.0,
    model: str = "mm-tiny",
    batch_size: int = 8,
    metadata: bool = True,
) -> Iterator[tuple[Path, int]]:
    """Draws `count` pictures; yields each file and its seed as soon as it is written."""
    import torch

    from mm import TextToImagePipeline

    first = secrets.randbelow(2**31) if seed is None else seed
    folder.mkdir(parents=True, exist_ok=True)
    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    for start in range(0, count, batch_size):
        seeds = [first + k for k in range(start, min(count, start + batch_size))]
        pictures = pipe(
            prompt,
            num_images_per_prompt=len(seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            mode=mode,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
        ).images
        for path, used, picture in zip(free_paths(folder, len(seeds)), seeds, pictures, strict=True):
            settings = {"prompt": prompt, "seed": used, "steps": steps, "mode": mode, "guidance": guidance}
            settings |= {"width": picture.width, "height": picture.height, "model": model}
            save_png(path, picture, settings if metadata else None)
            yield path, used
