"""`mm edit`: a picture changed by an instruction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli import options as shared
from mm.core.checks import MAX_SEED

app = typer.Typer(add_completion=False)


@app.command(epilog='Example: mm edit out/00000.png "make the cat blue" -o edited.png')
def edit(
    picture: Annotated[Path, typer.Argument(help="The picture to change.")],
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The new picture: .png with its settings, .jpg or .webp.")
    ] = Path("edited.png"),
    mask: Annotated[
        Path | None, typer.Option(help="White where pixels may change; the rest stays bit for bit.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed, same picture.")] = 0,
    steps: shared.StepsOption = None,
    guidance: shared.GuidanceOption = None,
    image_guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="How closely the source is followed (default: the model's).")
    ] = None,
    mode: shared.ModeOption = None,
    best_of: shared.BestOfOption = None,
    strict: shared.StrictOption = None,
    fast: shared.FastOption = False,
    fast_set: shared.FastSetOption = None,
    negative: shared.NegativeOption = None,
    size: shared.SizeOption = None,
    scheduler: shared.SchedulerOption = None,
    model: shared.ModelOption = "mm-tiny",
    base: shared.BaseOption = None,
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    offload: shared.OffloadOption = shared.OffloadTo.auto,
    dtype: shared.DtypeOption = shared.Dtype.auto,
    force: shared.ForceOption = False,
    more: shared.SetOption = None,
) -> None:
    """Changes a picture by an instruction. Exit code 3: the result is the source, so nothing was changed."""
    from mm.cli.running import follow, say
    from mm.core.pictures import check_output_type, read_picture
    from mm.engine import output
    from mm.engine.changes import unchanged
    from mm.engine.events import Picture
    from mm.engine.requests import Edit

    output.check_file(out, force=force)
    source = read_picture(picture)
    given: dict[str, Any] = {
        "image": source, "instruction": instruction, "mask": None if mask is None else read_picture(mask),
        "seed": seed, "steps": steps, "guidance": guidance, "image_guidance": image_guidance, "negative": negative,
        "mode": mode.value if mode else None, "size": shared.size(size), "options": shared.settings(more),
        "best_of": best_of or 1, "strict": strict, "fast": shared.fast(fast, fast_set) or False,
    }  # fmt: skip
    check_output_type(given["options"], file=True)
    Edit(**given)  # wrong values fail before a model is loaded
    loading = shared.Loading(model=model, base=base, bits=bits, adapters=lora, offload=offload, dtype=dtype)
    engine = loading.engine()
    request = Edit(**given, scheduler=shared.scheduler(scheduler, engine.capabilities))
    made: list[Picture] = []
    follow(engine.run(request), made.append)
    output.save_file(out, made[0].picture, made[0].settings | {"source": picture.name}, force=force)
    print(f"{out}  seed {seed}")
    if unchanged(source, made[0].picture):
        say(f"{out} is the same picture as {picture}: nothing was changed; word the instruction otherwise")
        raise typer.Exit(3)
