"""`mm ui`: the web app on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm ui --port 7860, then open http://127.0.0.1:7860")
def ui(
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    host: Annotated[str, typer.Option(help="Address to listen at; loopback unless you say so.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
) -> None:
    """Opens the web app."""
    import torch

    from mm import TextToImagePipeline
    from mm.ui.app import launch
    from mm.ui.studio import Studio

    pipe = TextToImagePipeline.from_pretrained(model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    print(f"mm is at http://{host}:{port} (stop with Ctrl+C)")
    launch(Studio(pipe, model), host=host, port=port)
