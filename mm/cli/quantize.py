"""`mm quantize`: a 4-bit copy of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm.cli import options as shared
from mm.core.checks import MAX_SEED
from mm.core.nouns import counted
from mm.core.paths import expanded, resolve_model

if TYPE_CHECKING:
    from mm.quantization.report import Report

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm quantize mm-tiny -o small/    mm generate 'a red cat' --model small/")
def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=shared.MODEL_HELP)],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder for the copy and its report.")],
    base: shared.BaseOption = None,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the 16-bit branch.")] = 32,
    bits: Annotated[str, typer.Option(help="Of weights: 4, 8, or auto (with --size-budget).")] = "4",
    size_budget: Annotated[
        float | None, typer.Option(help="For --bits auto: share of the layers' 16-bit size, 0.28 to 1.")
    ] = None,
    activation_bits: Annotated[int, typer.Option(help="Of inputs: 8, 4 or 16.")] = 8,
    data_free: Annotated[bool, typer.Option(help="No calibration: quick, and worse.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="Calibration prompts, one a line (default: built in).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of calibration pictures.")] = 8,
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels a side of calibration pictures (default: the model's own).")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Read files of this variant, for example fp16.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures compared before and after.")] = 8,
    compose: Annotated[
        int, typer.Option(min=0, help="Prompts a task judged before and after (models of our world).")
    ] = 4,
    component: Annotated[
        list[str] | None,
        typer.Option(help="Only this part of the pipeline; may be repeated (default: the parts that draw)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed, same bytes.")] = 0,
) -> None:
    """Writes a 4-bit copy of a model, with a report of what it cost."""
    from mm.core.errors import UserError
    from mm.engine.notices import no_loading_bars
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.folders import quantize_folder

    drawn = [name for name, count in (("pictures", pictures), ("compose", compose)) if count]
    if data_free and (unused := shared.given(context, "prompts", "steps", "size", *drawn)):
        raise UserError(f"--data-free draws nothing, so {unused[0]} has no effect; leave one of the two out")
    is_file = expanded(model).is_file()
    if not is_file:
        resolve_model(model)
    if base is not None and not is_file:
        raise UserError(f"--base belongs to a model in a single file, and {model} is none; leave it out")
    given: Any = int(bits) if bits.isdecimal() else bits  # the config refuses what is neither a number nor "auto"
    config = SVDQuantConfig(
        rank=rank, bits=given, size_budget=size_budget, activation_bits=activation_bits, data_free=data_free,
        steps=steps, size=size, seed=seed,
    )  # fmt: skip
    lines = None if prompts is None else _prompts(prompts)
    no_loading_bars()
    with _folder(expanded(model), base, out) if is_file else nullcontext(model) as where:
        report = quantize_folder(
            where,
            out,
            config,
            prompts=lines,
            pictures=pictures,
            compose=compose,
            components=component or None,
            variant=variant,
        )
    for line in _lines(out, report):
        print(line)


def _prompts(file: Path) -> list[str]:
    """The lines of a file of prompts. Raises UserError where there is none."""
    from mm.core.errors import UserError
    from mm.core.files import read_text_lines

    lines = [line.strip() for line in read_text_lines(file, "prompt file") if line.strip()]
    if not lines:
        raise UserError(f"{file} holds no prompt; give one a line")
    return lines


def _folder(path: Path, base: str | None, out: Path) -> AbstractContextManager[Path]:
    """A checkpoint in one file as a folder beside `out`, which goes when the copy is done."""
    from mm.engine.loading import local_folder
    from mm.engine.opening import as_folder

    return as_folder(path, None if base is None else local_folder(base), out.with_name(f".{out.name}-16-bit"))


def _lines(out: Path, report: Report) -> Iterator[str]:
    """What became of the model, for a reader."""
    whole = report.whole
    done = [layer for layer in report.layers if layer.bits != 16]
    said = f", {whole['psnr']:.1f} dB to the 16-bit pictures" if "psnr" in whole else ""
    if judged := whole.get("compose"):
        said += f", compose {judged['before']:.2f} -> {judged['after']:.2f} ({100 * judged['change']:+.1f} points, "
        said += f"95 % {100 * judged['low']:+.1f} to {100 * judged['high']:+.1f})"
    yield f"{out}: {counted(len(done), 'layer')}, {report.ratio:.2f} times smaller, {report.seconds:.0f} s{said}"
    if whole.get("folder_after"):
        before, after = whole["folder_before"], whole["folder_after"]
        yield f"all weights of the model: {before / 2**20:.1f} -> {after / 2**20:.1f} MiB, {before / after:.2f} times"
    for note, paths in report.notes().items():
        yield f"{counted(len(paths), 'layer')}: {note} ({paths[0]}{', ...' if len(paths) > 1 else ''})"
    if report.untouched:
        rows = report.untouched
        yield (
            f"{counted(len(rows), 'weight')} {'stays' if len(rows) == 1 else 'stay'} at 16 bits, "
            f"as {rows[0]['kind']} ({rows[0]['path']})"
        )
