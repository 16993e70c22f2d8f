"""`mm chat`: a conversation of words and pictures in the terminal."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: mm chat -o out/    then: draw a tree at night / add an owl above it / how many owls are there?"
)
def chat(
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures.")] = Path("out"),
    seed: Annotated[int, typer.Option(min=0, help="Picture k of the conversation has seed + k.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 12,
) -> None:
    """Converses: words and pictures in and out. /image FILE, /new, /quit; a script may come on stdin, a turn a line."""
    from mm.chatting import converse

    warnings.showwarning = lambda text, *_, **__: print(f"mm: {text}", file=sys.stderr)
    converse(model, out, seed=seed, steps=steps, lines=sys.stdin, interactive=sys.stdin.isatty())
