"""`mm ui`: the web app on this machine, for any model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from mm.cli import options as shared
from mm.core.adapter_files import adapter_label

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: mm ui --model mm-tiny --port 7860, then open http://127.0.0.1:7860")
def ui(
    model: shared.ModelOption = "mm-tiny",
    base: shared.BaseOption = None,
    bits: shared.BitsOption = None,
    lora: shared.AdapterOption = None,
    offload: shared.OffloadOption = shared.OffloadTo.auto,
    dtype: shared.DtypeOption = shared.Dtype.auto,
    host: Annotated[str, typer.Option(help="Address to listen at; loopback unless you say so.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
) -> None:
    """Opens the web app, with the tabs that the model can serve."""
    from mm.ui.ports import check_address

    check_address(host, port)  # before the model is loaded, which can take minutes
    adapters = [shared.adapter(one) for one in lora or ()]
    engine = shared.Loading(model=model, base=base, bits=bits, adapters=lora, offload=offload, dtype=dtype).engine()
    with TemporaryDirectory(prefix="mm-ui-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)  # Gradio trusts the working directory: an empty one of its own
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "cache"))
        from mm.ui.app import launch

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways to stop it remove the folder
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's & had switched it off
        names = [(adapter_label(file), scale) for file, scale in adapters]
        try:
            page = launch(engine, Path(folder), adapters=names, host=host, port=port, block=False)
            print(f"mm is at http://{_shown(host)}:{port} (stop with Ctrl+C)", flush=True)
            page.block_thread()
        finally:
            os.chdir("/")


def _shown(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
