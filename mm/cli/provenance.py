"""`mm provenance`: what a picture says of where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm provenance out/00000.png")
def provenance(
    picture: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.")],
    fingerprint: Annotated[
        Path | None, typer.Option(help="A fingerprint's file; default: the one of the embedded model, if it has one.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write what was found here.")] = None,
) -> None:
    """Reads a picture's settings, the fingerprint in its pixels, and its content credentials."""
    from dataclasses import asdict

    from mm.core.files import write_json
    from mm.provenance.fingerprint import Fingerprint
    from mm.provenance.report import embedded_fingerprint
    from mm.provenance.report import provenance as read

    known = Fingerprint.load(fingerprint) if fingerprint is not None else embedded_fingerprint()
    found = read(picture, known)
    for line in found.lines():
        print(line)
    if json_file is not None:
        write_json(json_file, asdict(found))
