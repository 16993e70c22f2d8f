"""`mm describe`: what a picture shows, and answers to questions."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog='Example: mm describe out/00000.png --ask "how many cats are there?"')
def describe(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.")],
    ask: Annotated[list[str] | None, typer.Option(help="A question; may be repeated (default: a description).")] = None,
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the answers here.")] = None,
) -> None:
    """Describes pictures, or answers questions about them."""
    from mm.core.paths import resolve_model

    warnings.showwarning = lambda text, *_, **__: print(f"mm: {text}", file=sys.stderr)
    resolve_model(model)
    from mm.core.devices import place
    from mm.core.files import write_json
    from mm.pipelines.answers import DESCRIBE
    from mm.pipelines.pictures import open_picture
    from mm.pipelines.understanding import UnderstandingPipeline

    opened = [open_picture(path) for path in pictures]
    pipe = place(UnderstandingPipeline.from_pretrained(model))
    questions = ask or [DESCRIBE]
    rows = []
    for path, picture in zip(pictures, opened, strict=True):
        result = pipe(picture, questions)
        if result.outside[0]:
            print(
                f"mm: {path} lies outside the model's world ({result.psnr[0]:.0f} dB); do not trust this",
                file=sys.stderr,
            )
        for question, answer in zip(questions, result.answers, strict=True):
            prefix = f"{path}: " if len(pictures) > 1 else ""
            print(f"{prefix}{answer}" if not ask or len(questions) == 1 else f"{prefix}{question} {answer}")
            rows.append({"picture": str(path), "question": question, "answer": answer, "outside": result.outside[0]})
    if json_file:
        write_json(json_file, json.loads(json.dumps(rows)))
