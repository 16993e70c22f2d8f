"""Pictures from a prompt into a folder: what `mm generate` does, for scripts too.

Design choices
- Files are numbered on from what is there; nothing is ever overwritten, and each appears whole or not at all.
- Every picture carries its own seed, so that any single one can be drawn again.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mm.core.devices import place
from mm.core.errors import UserError
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
    best_of: int = 1,
    model: str = "mm-tiny",
    batch_size: int = 8,
    quantized: bool = False,
    metadata: bool = True,
) -> Iterator[tuple[Path, int]]:
    """Draws `count` pictures; yields each file and its seed as soon as it is written.

    `best_of`: the most times that a picture is drawn until its numbers are right; warns where none of the tries is.
    """
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
    if best_of > 1 and not isinstance(pipe, TextToImagePipeline):
        raise UserError(f"{model} has no counter, so it cannot draw the best of {best_of}; leave --best-of out")
    place(pipe)
    tries: dict[str, Any] = {"best_of": best_of} if best_of > 1 else {}  # an argument that public models do not take
    for start in range(0, count, batch_size):
        seeds = [first + k for k in range(start, min(count, start + batch_size))]
        drawn = pipe(
            prompt,
            num_images_per_prompt=len(seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            mode=mode,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            **tries,
        )
        _warn_of_numbers(prompt, seeds, getattr(drawn, "right", []), best_of)
        for used, picture in zip(seeds, drawn.images, strict=True):
            settings = drawing_settings(
                prompt=prompt, seed=used, steps=steps, mode=mode, guidance=guidance, model=model,
                **tries, **({"quantized": True} if quantized else {}),
            )  # fmt: skip
            yield save_numbered(folder, png_bytes(picture, settings if metadata else None)), used


def _warn_of_numbers(prompt: str, seeds: Sequence[int], right: Sequence[bool | None], best_of: int) -> None:
    """Says which pictures do not show the numbers that were asked for, or that nothing was checked."""
    if wrong := [seed for seed, fine in zip(seeds, right, strict=False) if fine is False]:
        text = ", ".join(map(str, wrong))
        warnings.warn(f"{best_of} tries drew other numbers than {prompt!r} asks for (seed {text})", stacklevel=3)
    if any(fine is None for fine in right):
        warnings.warn(f"best_of: {prompt!r} does not say how many of what, so each was drawn once", stacklevel=3)
