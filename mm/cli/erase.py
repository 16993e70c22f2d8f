"""`mm erase`: a patch that keeps a model from drawing concepts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli import options as shared
from mm.cli.eval_erase import setting_of
from mm.cli.progress_line import ProgressLine
from mm.core.nouns import counted

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
    scope: Annotated[str, typer.Option(help="draw, or read: pictures of it are not named either.")] = "draw",
    setting: Annotated[list[str] | None, typer.Option(help="name=value of the method, the value as JSON.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Also write a LoRA file for other programs.")] = None,
    layout: Annotated[str | None, typer.Option(help="Of --lora: diffusers (default), peft, kohya or comfyui.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="Regular expression over layers to edit.")] = None,
    force: shared.ForceOption = False,
) -> None:
    """Makes a patch after which the model draws something else where the concepts are asked for."""
    from mm.adapters.formats.writer import LAYOUTS

    _check_files(out, lora, layout, LAYOUTS, force)
    _check_scope(scope, lora)
    from mm.cli.running import quietly_loaded
    from mm.erasure.checks import check_call
    from mm.erasure.concepts import contexts_for
    from mm.erasure.erase import DEFAULT
    from mm.erasure.erase import erase as make
    from mm.erasure.files import export

    settings = dict(setting_of(s) for s in setting or ())
    given: dict[str, Any] = {
        "anchors": anchor[0] if anchor and len(anchor) == 1 else anchor, "retain": retain or "auto",
        "method": method or DEFAULT, "strength": strength, "scope": scope,
    }  # fmt: skip
    check_call(targets, **given, settings=settings, contexts=contexts_for(shared.family_of_model(model)))
    engine = quietly_loaded(model)
    with ProgressLine() as line:
        patch = make(engine.pipeline, targets, **given, sites=site or (), progress=line.show, **settings)
    if lora is not None:  # first, since it may be refused: either both files are written or none
        export(patch, lora, layout or LAYOUTS[0], target=engine.pipeline)  # type: ignore[arg-type]
    patch.save(out)
    report = patch.report
    for target, placed in report["anchors"].items():
        print(f"{target}: draws {placed or 'nothing in its place'}")
    print(f"retained: {', '.join(report['retained']) or 'nothing by name'}")
    print(f"{out}: {counted(len(patch.entries), 'layer')}, method {patch.method}, {report['seconds']} s")


def _check_files(out: Path, lora: Path | None, layout: str | None, layouts: Sequence[str], force: bool) -> None:
    """Raises UserError where the files cannot be written, are one, or `layout` is no layout of the second."""
    from mm.core.errors import UserError
    from mm.core.files import check_new

    for file in (out, lora):
        if file is not None:
            check_new(file, force=force)
    if lora is not None and lora.resolve() == out.resolve():
        raise UserError(f"{out} is the patch and the LoRA file; give --lora another name")
    if layout is not None and layout not in layouts:
        raise UserError(f"the layout is {layout!r}; there are {', '.join(layouts)}")
    if lora is None and layout is not None:
        raise UserError(f"--layout {layout} is that of --lora, which is not given; give both, or neither")


def _check_scope(scope: str, lora: Path | None) -> None:
    """Raises UserError for a LoRA file of an erasure that changes words, which no LoRA file holds."""
    from mm.core.errors import UserError

    if scope == "read" and lora is not None:
        raise UserError(f"--scope read changes a word, which no LoRA file holds; leave out --lora {lora}, or --scope")
