"""`mm describe`: what a picture shows, and answers to questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli import options as shared

app = typer.Typer(add_completion=False)


@app.command(epilog='Example: mm describe out/00000.png --ask "how many cats are there?"')
def describe(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.")],
    ask: Annotated[list[str] | None, typer.Option(help="A question; may be repeated (default: a description).")] = None,
    model: shared.ModelOption = "mm-tiny",
    base: shared.BaseOption = None,
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    offload: shared.OffloadOption = shared.OffloadTo.auto,
    dtype: shared.DtypeOption = shared.Dtype.auto,
    json_file: shared.JsonOption = None,
    force: shared.ForceOption = False,
) -> None:
    """Describes pictures, or answers questions about them. Exit code 1: some pictures could not be read."""
    from mm.cli.running import say
    from mm.core.errors import UserError
    from mm.core.files import write_json
    from mm.core.pictures import read_picture

    opened: dict[Path, Any] = {}
    for path in pictures:
        try:
            opened[path] = read_picture(path)
        except UserError as error:
            say(str(error))
    if not opened:
        raise typer.Exit(1)
    loading = shared.Loading(model=model, base=base, bits=bits, adapters=lora, offload=offload, dtype=dtype)
    rows = _answers(loading.engine(), opened, ask or [])
    for row in rows:
        prefix = f"{row['picture']}: " if len(pictures) > 1 else ""
        print(f"{prefix}{row['question']} {row['answer']}" if len(ask or []) > 1 else f"{prefix}{row['answer']}")
    if json_file is not None:
        write_json(json_file, rows)
    if len(opened) < len(pictures):
        raise typer.Exit(1)


def _answers(engine: Any, opened: dict[Path, Any], questions: list[str]) -> list[dict[str, Any]]:
    """Picture, question and answer of every pair; what the model warns of goes to stderr with the picture's name."""
    from mm.cli.running import say
    from mm.engine.events import Notice, Words
    from mm.engine.requests import Describe
    from mm.pipelines.answers import DESCRIBE

    rows = []
    for path, picture in opened.items():
        warned: set[str] = set()
        for question in questions or (None,):
            events: list[Any] = []
            engine.run(Describe(image=picture, question=question)).each(events.append)
            notices = {event.text for event in events if isinstance(event, Notice)}
            for text in sorted(notices - warned):
                say(f"{path}: {text}")
            warned |= notices
            answer = "".join(event.text for event in events if isinstance(event, Words))
            outside = any(isinstance(event, Words) and event.outside for event in events)
            rows.append({"picture": str(path), "question": question or DESCRIBE, "answer": answer, "outside": outside})
    return rows
