"""The page in a real browser behind nginx, with the lines of docs/page.md: at the root and below a path (slow)."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_page import CHROMIUM, browser_of, free_port, save_reader, served

import mm
from mm.core.png_settings import read_settings

ROOT = Path(__file__).resolve().parents[2]
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or NGINX is None, reason="needs Debian's chromium and nginx, and playwright"),
]
_CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log stderr; worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


def location(path: str, at: str) -> str:
    """The block of docs/page.md for another path and address; without a password."""
    text = (ROOT / "docs" / "page.md").read_text(encoding="utf-8")
    found = re.search(r"```text\n(location /mm/ \{.*?\n\})\n```", text, re.DOTALL)
    assert found
    lines = [line for line in found[1].splitlines() if "auth_basic" not in line]
    block = "\n".join(lines).replace("location /mm/", f"location {path}/")
    assert "http://127.0.0.1:7860/" in block
    return block.replace("http://127.0.0.1:7860", at)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mm.load(save_reader(tmp_path_factory.mktemp("model")))


@pytest.fixture(params=["", "/mm"])
def proxied(
    request: pytest.FixtureRequest, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of the page behind nginx."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    if request.param:
        monkeypatch.setenv("GRADIO_ROOT_PATH", request.param)
    (tmp_path / "pictures").mkdir()
    port = free_port()
    with served(engine, tmp_path / "pictures") as at:
        config = tmp_path / "nginx.conf"
        config.write_text(_CONFIG.format(folder=tmp_path, port=port, location=location(request.param, at)))
        server = subprocess.Popen([str(NGINX), "-p", str(tmp_path), "-c", str(config)])
        try:
            yield f"http://127.0.0.1:{port}{request.param}/"
        finally:
            server.terminate()
            server.wait()


def test_the_page_loads_draws_reports_and_stops(proxied: str, tmp_path: Path) -> None:
    """All requests go to the proxy's address and path; nothing of them fails."""
    with browser_of() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        asked: list[tuple[str, int]] = []
        raised: list[str] = []
        tab.on("response", lambda response: asked.append((response.url, response.status)))
        tab.on("pageerror", lambda error: raised.append(str(error)))
        end = time.monotonic() + 300
        while True:
            try:
                tab.goto(proxied)
                break
            except Exception:  # nginx does not listen yet
                assert time.monotonic() < end
                time.sleep(0.1)
        tab.wait_for_selector("#go", timeout=120_000)
        asked.clear()
        tab.get_by_label("Seed", exact=True).first.fill("7")
        tab.locator("#go").click()
        tab.wait_for_selector("#draw-status >> text=4 of 4 done", timeout=120_000)
        picture = tab.locator("#draw-pictures .thumbnail-item img").first
        data = tab.request.get(picture.get_attribute("src") or "").body()
        (tmp_path / "shown.png").write_bytes(data)
        assert Image.open(tmp_path / "shown.png").size == (128, 128)
        assert read_settings(tmp_path / "shown.png")["seed"] == 7

        tab.locator("#draw-more >> text=More").click()
        tab.locator("#draw-more").get_by_label("Steps").fill("1000")
        tab.locator("#go").click()
        tab.wait_for_selector("#draw-status >> text=step", timeout=120_000)  # events come while it draws
        tab.locator("#cancel").click()
        tab.wait_for_selector("#draw-status >> text=stopped", timeout=120_000)
        tab.locator("#go").click()
        tab.wait_for_selector("#draw-status >> text=step", timeout=120_000)
        assert any(thread.name == "mm-run" for thread in threading.enumerate())
        tab.close()  # nginx closes the stream of a browser that has gone, which stops the order
        end = time.monotonic() + 300
        while any(thread.name == "mm-run" for thread in threading.enumerate()):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not raised
        assert all(url.startswith((proxied, "data:", "blob:")) for url, _ in asked), asked
        assert not [one for one in asked if one[1] >= 400]
