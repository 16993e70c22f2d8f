"""`mm edit`: a picture changed by an instruction."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from mm.cli.options import DrawingMode
from mm.families.mm_tiny import GUIDANCE

app = typer.Typer(add_completion=False)


@app.command(epilog='Example: mm edit out/00000.png "make the cat blue" -o edited.png')
def edit(
    picture: Annotated[Path, typer.Argument(help="The picture to change.")],
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new picture; it must not exist yet.")] = Path(
        "edited.png"
    ),
    mask: Annotated[
        Path | None, typer.Option(help="White where pixels may change; the rest stays bit for bit.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same picture.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps (flow 12, codes 32).")] = None,
    guidance: Annotated[float, typer.Option(min=0, max=100, help="How strictly the words are followed.")] = GUIDANCE,
    image_guidance: Annotated[float, typer.Option(min=0, max=100, help="How closely the source is followed.")] = 1.5,
    mode: Annotated[DrawingMode, typer.Option(help="By flow matching, or in codes.")] = DrawingMode.flow,
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
) -> None:
    """Changes a picture by an instruction."""
    from mm.editing import edit_to_file

    warnings.showwarning = lambda text, *_, **__: print(f"mm: {text}", file=sys.stderr)
    edit_to_file(
        picture, instruction, out, mask=mask, seed=seed, steps=steps, guidance=guidance, image_guidance=image_guidance,
        mode=mode.value, model=model,
    )  # fmt: skip
    print(f"{out}  seed {seed}")
