"""`mm generate`: pictures from a prompt, as PNG files that carry their settings."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from mm.cli.options import DrawingMode
from mm.families.mm_tiny import GUIDANCE

app = typer.Typer(add_completion=False)


@app.command(epilog='Example: mm generate "two red cats on grass, watercolor style" -n 4 --seed 7 -o out/')
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=1000, help="How many pictures.")] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of the first picture; picture k has seed + k.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps (flow 12, codes 32).")] = None,
    mode: Annotated[DrawingMode, typer.Option(help="By flow matching, or in codes.")] = DrawingMode.flow,
    guidance: Annotated[
        float, typer.Option(min=0, max=100, help="How strictly the prompt is followed; 1 = off.")
    ] = GUIDANCE,
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures.")] = Path("out"),
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once; changes no picture.")] = 8,
    quantized: Annotated[
        bool, typer.Option("--quantized", help="Draw with 4-bit weights; the first time makes them, in about a minute.")
    ] = False,
    metadata: Annotated[bool, typer.Option(help="Keep the settings in the PNG files.")] = True,
) -> None:
    """Draws pictures from a prompt."""
    from mm.drawing import draw_to_folder

    warnings.showwarning = lambda text, *_, **__: print(f"mm: {text}", file=sys.stderr)
    written = draw_to_folder(
        prompt,
        out,
        count=count,
        seed=seed,
        steps=steps,
        mode=mode.value,
        guidance=guidance,
        model=model,
        batch_size=batch_size,
        quantized=quantized,
        metadata=metadata,
    )
    for path, used in written:
        print(f"{path}  seed {used}")
