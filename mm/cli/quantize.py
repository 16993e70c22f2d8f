"""`mm quantize`: a 4-bit copy of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm quantize mm-tiny -o small/    mm generate 'a red cat' --model small/")
def quantize(
    model: Annotated[str, typer.Argument(help="An embedded model, a diffusers folder, or a hub name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder for the copy and its report.")],
    rank: Annotated[int, typer.Option(min=0, help="Rank of the 16-bit branch.")] = 32,
    bits: Annotated[str, typer.Option(help="Of weights: 4, 8, or auto (with --size-budget).")] = "4",
    size_budget: Annotated[
        float | None, typer.Option(help="For --bits auto: share of the layers' 16-bit size, 0.28 to 1.")
    ] = None,
    activation_bits: Annotated[int, typer.Option(help="Of inputs: 8, 4 or 16.")] = 8,
    data_free: Annotated[bool, typer.Option(help="No calibration: quick, and worse.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Calibration prompts, one a line (default: built in).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of calibration pictures.")] = 8,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures compared before and after.")] = 8,
    compose: Annotated[
        int, typer.Option(min=0, help="Prompts a task judged before and after (models of our world).")
    ] = 4,
    component: Annotated[
        list[str] | None, typer.Option(help="Only this part of the pipeline; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
) -> None:
    """Writes a 4-bit copy of a model, with a report of what it cost."""
    from mm.core.errors import UserError
    from mm.core.files import read_text_lines
    from mm.core.paths import resolve_model
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.folders import quantize_folder

    resolve_model(model)
    try:
        config = SVDQuantConfig(
            rank=rank,
            bits="auto" if bits == "auto" else int(bits),
            size_budget=size_budget,
            activation_bits=activation_bits,
            data_free=data_free,
            steps=steps,
            seed=seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    lines = None
    if prompts is not None:
        lines = [line.strip() for line in read_text_lines(prompts, "prompt file") if line.strip()]
        if not lines:
            raise UserError(f"{prompts} holds no prompt; give one a line")
    report = quantize_folder(
        model, out, config, prompts=lines, pictures=pictures, compose=compose, components=component or None
    )
    psnr = f", {report.whole['psnr']:.1f} dB to the 16-bit pictures" if "psnr" in report.whole else ""
    if judged := report.whole.get("compose"):
        psnr += f", compose {judged['before']:.2f} -> {judged['after']:.2f} ({100 * judged['change']:+.1f} points, "
        psnr += f"95 % {100 * judged['low']:+.1f} to {100 * judged['high']:+.1f})"
    print(f"{out}: {len(report.layers)} layers, {report.ratio:.2f} times smaller, {report.seconds:.0f} s{psnr}")
