"""`mm erase`: a patch that keeps a model from drawing concepts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm erase wolf -o no-wolf.safetensors")
def erase(
    targets: Annotated[list[str], typer.Argument(help='Concepts: "wolf", "style: neon", "attribute: red of apple".')],
    out: Annotated[Path, typer.Option("-o", "--out", help="The patch file to write.")],
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    method: Annotated[
        str | None, typer.Option(help="uce (default), rece, robust, speed, oce, hirm, esd, salun, dve or prune.")
    ] = None,
    anchor: Annotated[list[str] | None, typer.Option(help="What is drawn instead; once, or once a target.")] = None,
    retain: Annotated[
        list[str] | None, typer.Option(help="Concepts that stay; default: the targets' neighbours.")
    ] = None,
    strength: Annotated[float, typer.Option(min=0.01, max=2, help="1 erases; less leaves a share.")] = 1.0,
    site: Annotated[list[str] | None, typer.Option(help="Regular expression over layers to edit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where it exists.")] = False,
) -> None:
    """Makes a patch after which the model draws something else where the concepts are asked for."""
    from mm.core.errors import UserError

    if out.exists() and not force:
        raise UserError(f"{out} exists; choose another name, or give --force")
    import mm
    from mm.erasure.erase import DEFAULT
    from mm.erasure.erase import erase as make

    engine = mm.load(model)
    patch = make(
        engine.pipeline, targets, anchors=anchor[0] if anchor and len(anchor) == 1 else anchor,
        retain=retain or "auto", method=method or DEFAULT, strength=strength, sites=site or (), progress=_show,
    )  # fmt: skip
    print(file=sys.stderr)
    patch.save(out)
    report = patch.report
    for target, placed in report["anchors"].items():
        print(f"{target}: draws {placed or 'nothing in its place'}")
    print(f"retained: {', '.join(report['retained']) or 'nothing by name'}")
    print(f"{out}: {len(patch.entries)} layers, method {patch.method}, {report['seconds']} s")


def _show(share: float, text: str) -> None:
    print(f"\r{share:4.0%} {text:<60}", end="", file=sys.stderr, flush=True)
