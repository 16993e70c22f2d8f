"""`mm merge`: one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli import options as shared
from mm.cli.progress_line import ProgressLine
from mm.core.nouns import counted

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm merge mug.safetensors cat.safetensors -o both.safetensors")
def merge(
    files: Annotated[list[Path], typer.Argument(help="Adapters: patches of mm, or LoRA files with --model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The adapter file to write.")],
    method: Annotated[str, typer.Option(help="sum, ties, dare, do, orthogonal, regmean or distill.")] = "sum",
    weight: Annotated[
        list[float] | None, typer.Option(help="How strongly one acts, once for each (default: 1 each).")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the values that ties and dare keep; default: 0.5.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of layers that are combined as whole changes; default: the sum of the ranks."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model; LoRA files of other programs, regmean and distill need it, and sums with DoRA or OFT."
        ),
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(help="What an adapter's subject is called in prompts, once for each, where files do not say it."),
    ] = None,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Of training for each adapter, by distill; default: 250.")
    ] = None,
    layout: Annotated[str, typer.Option(help="auto, mm, diffusers, kohya, comfyui or peft.")] = "auto",
    force: shared.ForceOption = False,
) -> None:
    """Merges adapters, so that one file draws all their subjects."""
    from mm.core.adapter_files import adapter_file
    from mm.core.files import check_new

    check_new(out, force=force)
    from mm.customization.learned import check_layout
    from mm.customization.merging.config import DRAWING, MergeConfig
    from mm.customization.merging.files import check_files, read_adapter
    from mm.customization.merging.merge import merge as make

    check_layout(layout)
    MergeConfig(
        count=len(files), method=method, weights=weight, density=density, rank=rank, words=word,
        with_model=model is not None, updates=updates,
    )  # fmt: skip
    files = [adapter_file(file) for file in files]
    check_files(files)
    target = None
    if model is not None:
        from mm.cli.running import quietly_loaded

        target = quietly_loaded(model).pipeline
    patches = [read_adapter(file, target) for file in files]
    check_layout(layout, word=any(patch.settings.get("tokens") for patch in patches))
    with ProgressLine() as line:
        drawing: dict[str, Any] = {"pipe": target}
        if method in DRAWING:
            drawing |= {"words": word, "updates": updates, "progress": line.show}
        merged = make(patches, method=method, weights=weight, density=density, rank=rank, name=out.stem, **drawing)
    merged.write(out, layout, target=target)  # type: ignore[arg-type]
    for pair, count in merged.report["overlap"].items():
        print(f"{pair}: {counted(count, 'layer')} in common")
    loss = merged.report["largest_loss"]
    print(
        f"{out}: {counted(len(merged.entries), 'entry', 'entries')}, {out.stat().st_size >> 10} "
        f"KiB, at most {loss:.1%} of a layer lost"
    )
