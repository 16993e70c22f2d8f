"""A picture changed by an instruction, from file to file: what `mm edit` does, for scripts too."""

from __future__ import annotations

from pathlib import Path

from mm.core.devices import place
from mm.core.errors import UserError
from mm.core.files import write_new_bytes
from mm.core.paths import resolve_model
from mm.core.png_settings import drawing_settings, png_bytes
from mm.families.mm_tiny import GUIDANCE, steps_for


def edit_to_file(
    picture: Path,
    instruction: str,
    out: Path,
    *,
    mask: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float = GUIDANCE,
    image_guidance: float = 1.5,
    mode: str = "flow",
    model: str = "mm-tiny",
) -> None:
    """Writes the edited picture to `out`, a PNG with its settings. Raises UserError when `out` exists."""
    resolve_model(model)
    steps = steps_for(mode, steps)
    if out.exists():
        raise UserError(f"{out} exists; choose another name, or remove it first")
    import torch

    from mm import ImageEditPipeline
    from mm.pipelines.pictures import open_picture

    source = open_picture(picture)
    chosen = None if mask is None else open_picture(mask)
    pipe = ImageEditPipeline.from_pretrained(model)
    place(pipe)
    made = pipe(
        source, instruction, mask_image=chosen, num_inference_steps=steps, guidance_scale=guidance,
        image_guidance_scale=image_guidance, mode=mode, generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip
    settings = drawing_settings(
        prompt=instruction, seed=seed, steps=steps, mode=mode, guidance=guidance, model=model,
        image_guidance=image_guidance, source=picture.name,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_new_bytes(out, png_bytes(made, settings))
