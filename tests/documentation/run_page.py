"""Takes the steps of a page in one process, without a network: `python run_page.py STEPS.json`.

A step is a Python block, an `mm` command, or a command of which only the arguments are parsed. The Python blocks of a
page share one namespace, as they would in a session.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import runpy
import socket
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NoReturn


class _Parsed(Exception):
    """The arguments were accepted."""


def _no_network(*_: object) -> NoReturn:
    raise OSError("no step of a page may use the network")


def _run_python(step: dict[str, Any], names: dict[str, Any]) -> None:
    """Tracebacks show the page and its line. A 4-bit copy is made without data: the search takes minutes."""
    if "bits=4" in step["text"]:
        from mm.quantization import copies

        if not isinstance(copies.quantize_folder, partial):
            copies.quantize_folder = partial(_without_data, copies.quantize_folder)  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of a name that a library gives up
        exec(compile("\n" * (step["line"] - 1) + step["text"], step["page"], "exec"), names)


def _without_data(quantize: Any, model: Any, out: Any, config: Any, **options: Any) -> Any:
    return quantize(model, out, dataclasses.replace(config, data_free=True), **options)


def _run_mm(arguments: list[str], stdin: str, *, parse_only: bool) -> None:
    from typer.core import TyperCommand

    import mm.cli

    invoke, lines = TyperCommand.invoke, sys.stdin
    if parse_only:
        TyperCommand.invoke = lambda *_: None  # type: ignore[method-assign]
    sys.stdin = io.StringIO(stdin)
    try:
        mm.cli.app(arguments, prog_name="mm")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"exit code {end.code}") from end
    finally:
        TyperCommand.invoke, sys.stdin = invoke, lines  # type: ignore[method-assign]


def _parse_script(arguments: list[str]) -> None:
    """Runs `python FILE ...` or `python -m MODULE ...` up to the point where its arguments have been parsed."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **options: Any) -> NoReturn:
        parse(self, *given, **options)
        raise _Parsed

    argparse.ArgumentParser.parse_args = stop  # type: ignore[method-assign,assignment]
    before, paths = sys.argv, list(sys.path)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except _Parsed:
        return
    finally:
        sys.argv, sys.path[:], argparse.ArgumentParser.parse_args = before, paths, parse  # type: ignore[method-assign]
    raise RuntimeError("the script ended without parsing its arguments")


def main(file: Path) -> int:
    names: dict[str, Any] = {"__name__": "__main__"}
    socket.socket.connect = _no_network  # type: ignore[method-assign,assignment]
    for step in json.loads(file.read_text(encoding="utf-8")):
        what = f"{step['page']}:{step['line']}"
        started = time.monotonic()
        try:
            if step["kind"] == "python":
                _run_python(step, names)
            elif step["kind"] == "script":
                _parse_script(step["arguments"])
            else:
                _run_mm(step["arguments"], step["stdin"], parse_only=step["kind"] == "parse")
        except BaseException:
            print(f"--- {what} failed: {step.get('text') or ' '.join(step['arguments'])}", file=sys.stderr, flush=True)
            raise
        print(f"--- {what} {step['kind']}: {time.monotonic() - started:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
