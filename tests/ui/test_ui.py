"""The Draw tab's logic with a tiny pipeline, and the page itself in a real browser (slow)."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from tiny import tiny_pipeline

from mm.core.errors import UserError
from mm.core.png_settings import read_settings
from mm.ui.studio import Order, Session, Studio

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tiny_pipeline(), "tiny", tmp_path)


def test_pictures_come_one_by_one_with_their_settings(studio: Studio) -> None:
    session = Session()
    steps = list(studio.draw(Order(prompt="a red cat", seed=5, count=3, steps=2), session))
    assert [s.done for s in steps] == [1, 2, 3]
    assert [read_settings(f)["seed"] for f in steps[-1].files] == [5, 6, 7]
    assert [s["seed"] for _, s in session.history] == [7, 6, 5]
    again = list(studio.draw(Order(prompt="a red cat", seed=6, count=1, steps=2), session))
    assert Path(again[0].files[0]).read_bytes()[-2000:] == Path(steps[1].files[1]).read_bytes()[-2000:]


def test_what_was_drawn_before_a_cancel_stays(studio: Studio) -> None:
    session = Session()
    run = studio.draw(Order(prompt="a red cat", count=5, steps=3), session)
    first = next(run)
    session.cancelled.set()
    last = list(run)[-1]
    assert last.files == first.files
    assert "stopped after 1 of 5" in last.notes[0]
    assert len(session.history) == 1
    assert len(list(studio.folder.iterdir())) == 1


def test_unknown_words_and_bad_orders_are_told(studio: Studio) -> None:
    progress = next(studio.draw(Order(prompt="a red tigr", steps=1), Session()))
    assert "tiger" in progress.notes[0]
    with pytest.raises(UserError, match="count is 99"):
        Order(prompt="a cat", count=99)
    with pytest.raises(UserError, match="steps is 0"):
        Order(prompt="a cat", steps=0)
    with pytest.raises(UserError, match="seed is -1"):
        Order(prompt="a cat", seed=-1)
    with pytest.raises(UserError, match="guidance is nan"):
        Order(prompt="a cat", guidance=float("nan"))
    with pytest.raises(UserError, match="empty"):
        next(studio.draw(Order(prompt=" "), Session()))


def test_visitors_do_not_share_a_session() -> None:
    import copy

    one = Session()
    one.history.append(("a", {}))
    assert copy.deepcopy(one).history == []


def test_history_is_bounded_and_goes_with_its_visitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.ui.studio.MAX_HISTORY", 2)
    session, paths = Session(), [tmp_path / str(k) for k in range(3)]
    for path in paths:
        path.write_text("picture")
        session.keep(str(path), {})
    assert [path.exists() for path in paths] == [False, True, True]
    session.forget()
    assert not list(tmp_path.iterdir()) and session.history == []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_api_draws_gives_errors_in_a_line_and_serves_nothing_else(studio: Studio) -> None:
    import httpx
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    from mm.ui.app import launch

    port = _free_port()
    page = launch(studio, port=port, block=False)
    at = f"http://127.0.0.1:{port}"
    try:
        with pytest.raises(UserError, match=f"port {port} is taken"):
            launch(studio, port=port, block=False)
        client = Client(at, verbose=False)
        pictures, progress = client.predict("a red tigr", "5", 2, 1, "flow", 4, api_name="/draw")
        assert progress.startswith("2 of 2 done") and "tiger" in progress
        assert [read_settings(one["image"])["seed"] for one in pictures] == [5, 6]
        for bad, said in (
            (("a cat", "x", 1, 1, "flow", 4), "type a whole number"),
            (("a cat", "9" * 5000, 1, 1, "flow", 4), "type a whole number"),
            ((" ", "", 1, 1, "flow", 4), "empty"),
            (("a cat", "", 1.5, 1, "flow", 4), "1.5"),
            (("a cat", "", 99, 1, "flow", 4), "99"),
            (("a cat", "", 1, 1, "magic", 4), "magic"),
        ):
            with pytest.raises(AppError, match=said) as raised:
                client.predict(*bad, api_name="/draw")
            assert "\n" not in str(raised.value)
        own = str(next(studio.folder.glob("*.png")))
        for path in (own, "/etc/passwd", str(Path(__file__)), f"{studio.folder}/../x"):
            assert httpx.get(f"{at}/gradio_api/file={path}").status_code in (403, 404), path
        assert "fonts.googleapis" not in httpx.get(at).text
    finally:
        page.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, and playwright")
def test_the_page_draws_in_a_browser(studio: Studio) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    from mm.ui.app import launch

    port, asked = _free_port(), []
    page = launch(studio, port=port, block=False)
    options = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking"]
    try:
        with playwright.sync_playwright() as player:
            browser = player.chromium.launch(executable_path=CHROMIUM, args=options)
            tab = browser.new_page(viewport={"width": 390, "height": 844})
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(f"http://127.0.0.1:{port}/")
            tab.get_by_label("Seed").fill("7")
            tab.get_by_role("button", name="Draw").click()
            tab.wait_for_selector("text=4 of 4 done", timeout=120_000)
            assert tab.locator("#pictures img").count() >= 4
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
            tab.locator("#pictures .thumbnail-item").nth(1).click()
            tab.wait_for_selector("#details >> text=seed 8", timeout=30_000)
            tab.get_by_role("button", name="Use these settings").click()
            tab.wait_for_function("document.querySelector('input[placeholder=random]').value == '8'", timeout=30_000)
            tab.get_by_label("Seed").fill("x7")
            tab.get_by_role("button", name="Draw").click()
            tab.wait_for_selector("text=type a whole number", timeout=60_000)
            assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")) for url in asked), asked
            browser.close()
    finally:
        page.close()
