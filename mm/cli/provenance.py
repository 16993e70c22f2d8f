"""`mm provenance`: what a picture says of where it comes from, and copies of a model whose pictures say it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mm.cli import options as shared

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm provenance out/00000.png")
def provenance(
    picture: Annotated[Path | None, typer.Argument(help="A PNG, JPEG or WebP file.")] = None,
    fingerprint: Annotated[
        Path | None, typer.Option(help="A fingerprint's file; default: the one of the embedded model, if it has one.")
    ] = None,
    stamp: Annotated[
        str | None, typer.Option(help="Instead: write a copy of the model whose pictures carry this number.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of --stamp: an embedded model or a folder (default: mm-tiny).")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Of --stamp: a new folder for the copy.")] = None,
    json_file: shared.JsonOption = None,
    force: shared.ForceOption = False,
) -> None:
    """Reads a picture's settings, the fingerprint in its pixels, and its content credentials."""
    from mm.core.errors import UserError

    if (picture is None) == (stamp is None):
        raise UserError("give a picture to read, or --stamp NUMBER and -o FOLDER to make a model that marks its own")
    if (stamp is None) != (out is None):
        raise UserError("--stamp NUMBER and -o FOLDER belong together; give both, or neither")
    if stamp is not None and json_file is not None:
        raise UserError("--json is for what a picture says; --stamp writes a model, so leave --json out")
    if picture is not None and model is not None:
        raise UserError(f"--model {model} is the model that --stamp copies; to read a picture leave it out")
    if picture is None:
        assert stamp is not None and out is not None
        _stamp(stamp, fingerprint, model or "mm-tiny", out)
        return
    from mm.core.files import write_json
    from mm.provenance.fingerprint import Fingerprint
    from mm.provenance.report import embedded_fingerprint
    from mm.provenance.report import provenance as read

    known = Fingerprint.load(fingerprint) if fingerprint is not None else embedded_fingerprint()
    found = read(picture, known)
    for line in found.lines():
        print(line)
    if json_file is not None:
        write_json(json_file, found.as_json())


def _stamp(text: str, file: Path | None, model: str, out: Path) -> None:
    """Writes the copy of `--stamp`."""
    from mm.core.errors import UserError
    from mm.core.paths import resolve_model
    from mm.provenance.fingerprint import Fingerprint
    from mm.provenance.report import embedded_fingerprint
    from mm.provenance.stamping import number_of, stamped_copy

    number = number_of(text)
    where = resolve_model(model)
    known = Fingerprint.load(file) if file is not None else embedded_fingerprint()
    if known is None:
        raise UserError(
            "no fingerprint comes with this installation; make one (mm train mm-tiny --stage fingerprint --init-from "
            "weights/mm-tiny) and give its file with --fingerprint"
        )
    known.bits_of(number)
    if out.exists():
        raise UserError(f"{out} exists; give a new folder")
    from mm.cli.running import quietly_loaded

    source = where if isinstance(where, Path) else None
    stamped_copy(quietly_loaded(model).pipeline, known, number, out, source=source)
    print(f"{out}: a copy of {model} whose pictures carry {number:#0{2 + known.config.bits // 4}x}")
