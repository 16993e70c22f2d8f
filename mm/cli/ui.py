"""`mm ui`: the web app on this machine, for any model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm ui --port 7860, then open http://127.0.0.1:7860")
def ui(
    model: Annotated[str, typer.Option(help="An embedded model, a folder, a file or a hub name.")] = "mm-tiny",
    bits: Annotated[int | None, typer.Option(help="4 or 8 draws with a quantized copy, made once.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="A LoRA as FILE or FILE:SCALE; can be repeated.")] = None,
    patch: Annotated[list[str] | None, typer.Option(help="A patch as FILE or FILE:SCALE; can be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    offload: Annotated[str, typer.Option(help="auto, none, model or group.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen at; loopback unless you say so.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
) -> None:
    """Opens the web app."""
    from mm.ui.ports import check_address

    check_address(host, port)  # before the model is loaded, which can take minutes
    adapters = [file_and_scale(one) for one in (*(patch or ()), *(lora or ()))]

    import mm

    engine = mm.load(model, bits=bits, device=device, dtype=dtype, offload=offload, adapters=adapters)  # type: ignore[arg-type]
    with TemporaryDirectory(prefix="mm-ui-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)  # Gradio trusts the working directory: an empty one of its own
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "cache"))
        from mm.ui.app import launch

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways to stop it remove the folder
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's & had switched it off
        names = [(Path(file).name, scale) for file, scale in adapters]
        try:
            page = launch(engine, Path(folder), adapters=names, host=host, port=port, block=False)
            print(f"mm is at http://{_shown(host)}:{port} (stop with Ctrl+C)", flush=True)
            page.block_thread()
        finally:
            os.chdir("/")


def _shown(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def file_and_scale(text: str) -> tuple[str, float]:
    """FILE:SCALE as both; the scale of FILE alone is 1."""
    from mm.core.errors import UserError

    file, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(scale)
    except ValueError:
        return text, 1.0  # a colon of the path
    if not abs(value) <= 100:  # a NaN fails here too
        raise UserError(f"the scale of {file} is {scale}; give a number from -100 to 100")
    return file, value
