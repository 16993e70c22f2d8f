"""Pictures from a prompt into a folder: what `mm generate` does, for scripts too.

Design choices
- Files are numbered on from what is there; nothing is ever overwritten, and each appears whole or not at all.
- Every picture carries its own seed, so that any single one can be drawn again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

from mm.core.devices import place
from mm.core.files import write_new_bytes
from mm.core.paths import resolve_model
from mm.core.png_settings import drawing_settings, png_bytes
from mm.families.mm_tiny import GUIDANCE, steps_for


def save_numbered(folder: Path, data: bytes) -> Path:
    """Writes a PNG under the number after the last one in `folder`: 00000.png, 00001.png, ..."""
    while True:
        taken = [int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal()]
        path = folder / f"{max(taken, default=-1) + 1:05d}.png"
        try:
            write_new_bytes(path, data)
        except FileExistsError:  # another command draws into the same folder, and was quicker
            continue
        return path


def draw_to_folder(
    prompt: str,
    folder: Path,
    *,
    count: int = 1,
    seed: int | None = None,
    steps: int | None = None,
    mode: str = "flow",
    guidance: float = GUIDANCE,
    model: str = "mm-tiny",
    batch_size: int = 8,
    quantized: bool = False,
    metadata: bool = True,
) -> Iterator[tuple[Path, int]]:
    """Draws `count` pictures; yields each file and its seed as soon as it is written."""
    resolve_model(model)  # a wrong name fails before seconds of imports
    import torch

    from mm import TextToImagePipeline

    steps = steps_for(mode, steps)
    first = secrets.randbelow(2**31) if seed is None else seed
    folder.mkdir(parents=True, exist_ok=True)
    if quantized:
        from mm.quantization.folders import quantized_copy

        where: str | Path = quantized_copy(model)
    else:
        where = model
    pipe = TextToImagePipeline.from_pretrained(where)
    place(pipe)
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
        for used, picture in zip(seeds, pictures, strict=True):
            settings = drawing_settings(
                prompt=prompt, seed=used, steps=steps, mode=mode, guidance=guidance, model=model,
                **({"quantized": True} if quantized else {}),
            )  # fmt: skip
            yield save_numbered(folder, png_bytes(picture, settings if metadata else None)), used
