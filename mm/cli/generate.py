"""`mm generate`: pictures from a prompt, as files that carry their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli import options as shared
from mm.core.checks import MAX_SEED

app = typer.Typer(add_completion=False)


@app.command(epilog='Example: mm generate "two red cats on grass, watercolor style" -n 4 --seed 7 -o out/')
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw: {cat|dog} and __name__ vary, (red:1.3) and word++ weigh.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("-n", "--count", min=1, max=1000, help="How many pictures (default: 1).")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_SEED,
            help="Seed of the first picture; picture k has seed + k (default: random, or that of --like).",
        ),
    ] = None,
    steps: shared.StepsOption = None,
    mode: shared.ModeOption = None,
    guidance: shared.GuidanceOption = None,
    negative: shared.NegativeOption = None,
    size: shared.SizeOption = None,
    scheduler: shared.SchedulerOption = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from (image-to-image).")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where --image is drawn anew (inpainting).")] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, max=1, help="How much of --image is redrawn (default: the pipeline's).")
    ] = None,
    best_of: shared.BestOfOption = None,
    strict: shared.StrictOption = None,
    apart: shared.ApartOption = False,
    stand_in: shared.StandInOption = None,
    refine: shared.RefineOption = None,
    fast: shared.FastOption = False,
    fast_set: shared.FastSetOption = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Draw with the settings in this PNG, JPEG or WebP, of mm or other programs."),
    ] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Draw every combination of the parts after |.")] = False,
    wildcards: Annotated[
        Path | None, typer.Option(help="Folder of NAME.txt for __NAME__, an alternative a line.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"{shared.MODEL_HELP} Default: mm-tiny.")] = None,
    base: shared.BaseOption = None,
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    offload: shared.OffloadOption = shared.OffloadTo.auto,
    dtype: shared.DtypeOption = shared.Dtype.auto,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for numbered PNG files, or one .png, .jpg or .webp file.")
    ] = Path("out"),
    force: shared.ForceOption = False,
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Pictures drawn at once; changes no picture.")] = 8,
    more: shared.SetOption = None,
    metadata: Annotated[bool, typer.Option(help="Keep the settings in the files.")] = True,
    quantized: shared.QuantizedOption = False,
) -> None:
    """Draws pictures from a prompt, from a picture (--image), or as another picture was drawn (--like)."""
    from mm.cli.drawing import Job, run

    given = {
        "count": count, "seed": seed, "steps": steps, "mode": mode.value if mode else None, "guidance": guidance,
        "negative": negative, "size": shared.size(size), "strength": strength, "best_of": best_of, "prompt": prompt,
        "options": shared.settings(more) or None, "strict": strict, "fast": shared.fast(fast, fast_set),
        "apart": shared.apart(apart, stand_in), "refine": refine,
    }  # fmt: skip
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    run(
        Job(
            changes=changes, scheduler=scheduler, image=image, mask=mask, like=like, matrix=matrix, wildcards=wildcards,
            out=out, force=force, batch_size=batch_size, metadata=metadata, model=model,
            loading={"base": base, "bits": bits, "adapters": lora, "offload": offload, "dtype": dtype},
        )
    )  # fmt: skip
