"""`mm words`: what mm-tiny can be asked to draw, edit and answer."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mm.cli import options as shared
from mm.cli.running import say

app = typer.Typer(add_completion=False)


class ForTask(StrEnum):
    """What words are for."""

    draw = "draw"
    edit = "edit"
    ask = "ask"


@app.command(epilog="Example: mm words --task draw --pictures words.png")
def words(
    task: Annotated[ForTask, typer.Option("--task", help="draw, edit or ask.")] = ForTask.draw,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", metavar="FILE.png", help="Also write a sheet of little pictures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: shared.ForceOption = False,
) -> None:
    """Lists the words that mm-tiny knows, by kind, with other words that it reads as the same."""
    from mm.core.errors import UserError
    from mm.core.files import check_new
    from mm.world.lexicon_list import known_words

    if pictures is not None and pictures.suffix != ".png":
        raise UserError(f"{pictures} is no .png file; give FILE.png")
    if pictures is not None:
        check_new(pictures, force=force)
    groups = known_words(task.value)
    if as_json:
        print(json.dumps(groups, indent=1, ensure_ascii=False))
    else:
        for kind, entries in groups.items():
            print(f"{kind} ({len(entries)})")
            for word, others in entries.items():
                print(f"  {word}" + (f"  (also: {', '.join(others)})" if others else ""))
    if pictures is not None:
        from mm.core.png_settings import save_png
        from mm.world.word_sheet import sheet

        save_png(pictures, sheet(), None)
        say(f"wrote {pictures}")
