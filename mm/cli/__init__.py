"""The `mm` command: a table of commands, each loaded only when it runs.

Adding a command is one file and one line in `COMMANDS`:

1. `mm/cli/NAME.py` exposes `app`, a `typer.Typer` with one command (or several, for a group such as `mm eval`):

       app = typer.Typer(add_completion=False)

       @app.command(epilog='Example: mm generate "two red cats on grass" -n 4 -o out/')
       def generate(prompt: Annotated[str, typer.Argument(help="What to draw.")], ...) -> None:
           \"\"\"Draws pictures from a prompt.\"\"\"
           import torch  # whatever is heavy (torch, diffusers, transformers, gradio) inside, so that --help is quick

   A group of which only one command exists so far needs an `@app.callback()`, or typer leaves its name out.
   A file holds options, one call into the library, and printing: no logic that a script could want.
2. In `COMMANDS`: name -> (module, help of one line). `mm --help` shows that line and imports no command.

What a command owes its caller:
- Results go to stdout or to files, progress and warnings to stderr. It returns None when all of it was done; otherwise
  it raises. `mm.core.errors.UserError` and OSError become one line on stderr and exit code 1, wrong options one line
  and 2.
  A code with a meaning of its own (batch: some rows failed) is `raise typer.Exit(2)`.
- Any other exception is a bug, and keeps its traceback.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import mm
from mm.core.busy_cores import watch_cores
from mm.core.errors import UserError
from mm.core.threads import bound_spinning

COMMANDS = {
    "generate": ("mm.cli.generate", "Draw pictures from a prompt."),
    "describe": ("mm.cli.describe", "Describe a picture, or answer questions about it."),
    "edit": ("mm.cli.edit", "Change a picture by an instruction."),
    "chat": ("mm.cli.chat", "Converse: words and pictures, in and out."),
    "eval": ("mm.cli.evaluate", "Measure a model: reconstruct, compose."),
    "erase": ("mm.cli.erase", "Make a patch that keeps a model from drawing concepts."),
    "customize": ("mm.cli.customize", "Learn a new subject or style from a few pictures."),
    "merge": ("mm.cli.merge", "Make one adapter of several."),
    "words": ("mm.cli.words", "List the words that mm-tiny knows."),
    "provenance": ("mm.cli.provenance", "Read what a picture says of where it comes from."),
    "quantize": ("mm.cli.quantize", "Write a 4-bit copy of a model, with a report."),
    "train": ("mm.cli.train", "Train a published model, or resume its training."),
    "ui": ("mm.cli.ui", "Open the web app."),
    "batch": ("mm.cli.batch", "Run a file of jobs; what is done already is skipped."),
    "doctor": ("mm.cli.doctor", "Report what this machine offers, what is slow, and why."),
}


class _Lazy(TyperCommand):
    """Stands in the list of commands; parsing its arguments loads the real one."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        module = importlib.import_module(COMMANDS[self.name or ""][0])
        command: Any = typer.main.get_command(module.app)
        _check_once(command, args, info_name, parent)
        return command.make_context(info_name, args, parent=parent, **extra)


def _check_once(command: Any, args: list[str], name: str | None, parent: Any) -> None:
    """Raises UserError where an option that takes one value is given twice, of which the first would have no effect."""
    context = command.context_class(command, info_name=name, parent=parent)
    values, rest, order = command.make_parser(context).parse_args(list(args))
    if "help" in values:
        return
    for option in order:
        if option.param_type_name == "option" and not (option.multiple or option.is_flag) and order.count(option) > 1:
            raise UserError(f"{option.opts[-1]} is given {order.count(option)} times; it takes one value")
    inner = getattr(command, "commands", {}).get(rest[0]) if rest else None
    if inner is not None:
        _check_once(inner, rest[1:], rest[0], context)


class _Commands(TyperGroup):
    """The table as a group, and the one place where errors become a line on stderr."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: _Lazy(name=name, help=line) for name, (_, line) in COMMANDS.items()}

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, *_, **__: say(text)
            self._main(*args, **kwargs)

    def _main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            text = error.format_message()  # empty where no arguments were given and the help is printed already
            at = getattr(getattr(error, "ctx", None), "command_path", "mm")
            code = _fail(text and f"{text.rstrip('.')}; see {at} --help", error.exit_code)
        except typer.Abort:
            code = _fail("stopped", 130)
        except UserError as error:
            code = _fail(str(error), 1)
        except OSError as error:
            named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            code = _fail(named, 1)
        sys.exit(code)


def say(text: object) -> None:
    """One line on stderr."""
    print("mm: " + " ".join(str(text).split()), file=sys.stderr)


def _fail(text: str, code: int) -> int:
    if text:
        say(text)
    return code


app = typer.Typer(name="mm", cls=_Commands, pretty_exceptions_enable=False, no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mm {mm.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: mm generate 'two red cats on grass, watercolor style' -n 4 --seed 7 -o out/")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Draws from text, and measures, trains and serves the models that do."""


def main() -> None:
    """The console script. How threads wait is set first: it cannot be changed once torch is loaded."""
    if bound_spinning():
        watch_cores()
    app(prog_name="mm")
