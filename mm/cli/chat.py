"""`mm chat`: a conversation of words and pictures in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm.cli import options as shared
from mm.core.checks import MAX_SEED

if TYPE_CHECKING:
    from mm.engine.engine import Engine

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: mm chat -o out/    then: draw a tree at night / add an owl above it / how many owls are there?"
)
def chat(
    model: shared.ModelOption = "mm-tiny",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures.")] = Path("out"),
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Picture k of the conversation has seed + k.")] = 0,
    steps: shared.StepsOption = None,
    best_of: shared.BestOfOption = None,
    strict: shared.StrictOption = None,
    base: shared.BaseOption = None,
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    offload: shared.OffloadOption = shared.OffloadTo.auto,
    dtype: shared.DtypeOption = shared.Dtype.auto,
) -> None:
    """Converses: words and pictures in and out. /image FILE, /new, /quit; a script may come on stdin, a turn a line."""
    from mm.core.errors import UserError
    from mm.core.files import check_folder

    check_folder(out)
    loading = shared.Loading(model=model, base=base, bits=bits, adapters=lora, offload=offload, dtype=dtype)
    talk = Talk(loading.engine(), out, seed=seed, steps=steps, strict=strict, best_of=best_of or 1)
    interactive = sys.stdin.isatty()
    if interactive:
        print("say what to draw, change or describe; /image FILE, /new, /quit\n> ", end="", flush=True)
    if talk.read(sys.stdin, interactive=interactive) and not interactive:
        raise UserError("some turns failed; see above")


class Talk:
    """A conversation over lines of text.

    Words go to stdout as they come, pictures into numbered files that are named. Ctrl-C stops the current turn and
    leaves the conversation as it was before; at the prompt it ends the command.
    """

    def __init__(
        self, engine: Engine, out: Path, *, seed: int, steps: int | None, strict: bool | None, best_of: int = 1
    ) -> None:
        """Begins a conversation. Raises UserError where the model cannot converse."""
        self.engine, self.out = engine, out
        self.settings: dict[str, Any] = {"seed": seed, "steps": steps, "strict": strict, "best_of": best_of}
        self.conversation: Any = engine.converse()
        self.picture: Any = None

    def read(self, lines: Iterable[str], *, interactive: bool = False) -> bool:
        """Answers line after line; whether any of them failed. Errors are printed, and the conversation goes on."""
        from mm.cli.running import say
        from mm.core.errors import UserError

        failed = False
        for line in lines:
            try:
                if not self._line(line.strip()):
                    break
            except UserError as error:
                failed = True
                say(str(error))
            except KeyboardInterrupt:
                print("\n(stopped)", flush=True)
            if interactive:
                print("> ", end="", flush=True)
        return failed

    def _line(self, words: str) -> bool:
        """One line; False ends the conversation."""
        from mm.core.errors import UserError
        from mm.core.pictures import read_picture

        if words == "/quit":
            return False
        if words == "/new":
            self.conversation, self.picture = self.engine.converse(), None
        elif words.startswith("/image "):
            self.picture = read_picture(Path(words.removeprefix("/image ").strip()))
        elif words == "/image":
            raise UserError("/image names no file; write /image FILE")
        elif words.startswith("/"):
            raise UserError(f"unknown command {words.split()[0]!r}; there are /image FILE, /new, /quit")
        elif words:
            self._turn(words)
            self.picture = None
        return True

    def _turn(self, words: str) -> None:
        from mm.cli.running import follow
        from mm.engine import output
        from mm.engine.events import Picture
        from mm.engine.requests import Turn

        def keep(event: Picture) -> None:
            path = output.save_numbered(self.out, output.picture_bytes(event.picture, event.settings))
            print(f"[{path}]", end="", flush=True)

        turn = Turn(conversation=self.conversation, words=words, image=self.picture, **self.settings)
        follow(self.engine.run(turn), keep)
        print(flush=True)
