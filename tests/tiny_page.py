"""A web app on a free port, and files to upload."""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tiny import tiny_reader

from mm import InterleavedPipeline

CHROMIUM = shutil.which("chromium")
_OPTIONS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking"]


@contextlib.contextmanager
def browser_of() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright; skips the test where that is not installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=_OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


def save_reader(folder: Path) -> Path:
    """A random model of ours that draws, edits, reads and converses."""
    InterleavedPipeline(**tiny_reader()).save_pretrained(folder)
    return folder


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def served(engine: Any, folder: Path, **options: Any) -> Iterator[str]:
    """The address of an engine's page while it is served; `folder` holds its pictures."""
    from mm.ui.app import launch

    port = free_port()
    page = launch(engine, folder, port=port, block=False, **options)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        page.close()


def png(width: int = 48, height: int = 32, colour: str = "red") -> bytes:
    """A picture's bytes."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def upload(at: str, data: bytes, name: str = "given.png") -> dict[str, Any]:
    """Uploads a file as the page does; what a request says of it."""
    answer = httpx.post(f"{at}/gradio_api/upload", files={"files": (name, data)})
    answer.raise_for_status()
    return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}


def call(at: str, name: str, *values: Any, read: bool = True, timeout: float = 60) -> httpx.Response:
    """A call through the queue over plain HTTP; the stream of its answer."""
    begun = httpx.post(f"{at}/gradio_api/call/{name}", json={"data": list(values)}, timeout=timeout)
    if begun.status_code != 200 or not read:
        return begun
    return httpx.get(f"{at}/gradio_api/call/{name}/{begun.json()['event_id']}", timeout=timeout)
