"""`mm ui`: the web app on this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm ui --port 7860, then open http://127.0.0.1:7860")
def ui(
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    host: Annotated[str, typer.Option(help="Address to listen at; loopback unless you say so.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
) -> None:
    """Opens the web app."""

    from mm import TextToImagePipeline
    from mm.core.devices import place

    pipe = TextToImagePipeline.from_pretrained(model)
    place(pipe)
    pipe.set_progress_bar_config(disable=True)
    with TemporaryDirectory(prefix="mm-ui-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)  # Gradio trusts the working directory: an empty one of its own
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "cache"))
        from mm.ui.app import launch
        from mm.ui.studio import Studio

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways to stop it remove the folder
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's & had switched it off
        print(f"mm is at http://{host}:{port} (stop with Ctrl+C)", flush=True)
        try:
            launch(Studio(pipe, model, Path(folder)), talker=_talker(pipe, model, folder), host=host, port=port)
        finally:
            os.chdir("/")


def _talker(pipe: Any, model: str, folder: str) -> Any:
    """The Talk tab's half, sharing the drawing pipeline's parts; None for a model that only draws."""
    from mm import InterleavedPipeline
    from mm.core.errors import UserError
    from mm.ui.talk import Talker

    try:
        both = InterleavedPipeline.from_pretrained(model, **pipe.components)
    except UserError:
        return None
    both.to(pipe.device)
    return Talker(both, Path(folder), model)
