"""The page in a real browser, at the sizes of a desktop and of a phone (slow)."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny_page import CHROMIUM, browser_of, png, save_reader, served

import mm
from mm.core.png_settings import read_settings, save_png
from mm.ui import forms

EVIL = "a red cat ![x](http://evil.example/a.png) <img src=http://evil.example/b.png onerror=alert(1)>"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PlaywrightTimeout = pytest.importorskip("playwright.sync_api").TimeoutError
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, and playwright"),
]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    root = tmp_path_factory.mktemp("app")
    engine = mm.load(save_reader(root / "model"))
    (root / "pictures").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "cache"))
        with served(engine, root / "pictures", adapters=[("style.safetensors", 0.75)]) as at:
            yield at, root


@pytest.fixture(scope="module")
def browser():
    with browser_of() as browser:
        yield browser


@pytest.fixture
def tab_of(app, browser):
    """Opens the page in a browser of its own; fails where anything else was asked for or a script raised."""
    opened = []

    def open_tab(viewport):
        context = browser.new_context(viewport=viewport)
        tab = context.new_page()
        asked: list[str] = []
        raised: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("pageerror", lambda error: raised.append(str(error)))
        tab.on("dialog", lambda dialog: raised.append(dialog.message))
        tab.goto(app[0])
        tab.wait_for_selector("#go")
        opened.append((context, asked, raised))
        return tab

    yield open_tab
    for context, asked, raised in opened:
        context.close()
        assert all(url.startswith((app[0], "data:", "blob:")) for url in asked), asked
        assert not raised


def fill(tab, label: str, value: str) -> None:
    tab.get_by_label(label, exact=True).first.fill(value)


def draw(tab, *, seed: str = "7", done: str = "4 of 4 done") -> None:
    fill(tab, "Seed", seed)
    tab.locator("#go").click()
    tab.wait_for_selector(f"#draw-status >> text={done}", timeout=60_000)


def set_steps(tab, steps: int) -> None:
    more = tab.locator("#draw-more")
    if not more.get_by_label("Steps").first.is_visible():
        more.get_by_role("button", name="More").click()
    more.get_by_label("Steps").first.fill(str(steps))


def wait_in_view(tab, selector: str) -> None:
    """Waits until the middle of an element is on the screen: the page scrolls to its results."""
    tab.wait_for_function(
        """selector => {
            const box = document.querySelector(selector)?.getBoundingClientRect();
            const middle = box ? box.y + box.height / 2 : -1;
            return middle >= 0 && middle <= window.innerHeight;
        }""",
        arg=selector,
    )


def wait_settled(tab, selector: str) -> None:
    """Waits until an element has a size, and is where it was and says what it said a moment before."""
    tab.wait_for_function(
        """selector => {
            const found = document.querySelector(selector), box = found?.getBoundingClientRect();
            const now = box && box.width > 50 ? [box.x, box.y, box.width, box.height, found.innerText].join() : "";
            const same = now !== "" && now === window.lastSeen;
            window.lastSeen = now;
            return same;
        }""",
        arg=selector,
        polling=300,
    )


def give(tab, selector: str, file: Path) -> None:
    """Gives a file to an upload, and waits until the page has sent it."""
    with tab.expect_response(lambda response: "/upload" in response.url):
        tab.locator(f"{selector} input[type=file]").first.set_input_files(file)


def click_until(clicked, shown, tries: int = 20) -> None:
    """Clicks until something is shown: a click is lost where the page replaces an element just then."""
    for _ in range(tries):
        clicked.click()
        with contextlib.suppress(PlaywrightTimeout):
            shown.first.wait_for(timeout=1500)
            return
    raise AssertionError(f"{shown} is not shown after {tries} clicks")


def wait_loaded(tab, selector: str, count: int) -> None:
    """Waits until so many pictures are loaded."""
    tab.wait_for_function(
        """([selector, count]) => {
            const all = [...document.querySelectorAll(selector)];
            return all.length === count && all.every(one => one.complete && one.naturalWidth > 0);
        }""",
        arg=[selector, count],
    )


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_it_draws_and_keeps_texts_as_text(tab_of, viewport) -> None:
    tab = tab_of(viewport)
    assert tab.locator("text=style.safetensors × 0.75").is_visible()
    tab.locator("#prompt textarea").fill(EVIL)
    draw(tab)
    wait_loaded(tab, "#draw-pictures .thumbnail-item img", 4)
    wait_in_view(tab, "#draw-pictures .thumbnail-item")
    assert "<img src=http" in tab.locator("#draw-details").inner_text()
    assert "are not known" in tab.locator("#draw-status").inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    wait_settled(tab, "#draw-pictures")
    click_until(tab.locator("#draw-pictures .thumbnail-item").nth(1), tab.locator("#draw-details >> text=seed 8"))
    tab.get_by_role("button", name="Use these settings").click()
    tab.wait_for_function("document.querySelector('#seed input, #seed textarea').value == '8'")


def test_an_error_is_shown_and_covers_nothing(tab_of) -> None:
    tab = tab_of(DESKTOP)
    fill(tab, "Seed", "x7")
    tab.locator("#go").click()
    tab.wait_for_selector("#draw-status >> text=give a whole number")
    draw(tab)


def test_draw_while_drawing_and_cancel(tab_of) -> None:
    tab = tab_of(DESKTOP)
    set_steps(tab, 300)
    tab.locator("#go").click()
    tab.wait_for_selector("#draw-status >> text=step")
    assert tab.locator("#go").is_disabled()
    tab.locator("#prompt textarea").press("Shift+Enter")
    tab.wait_for_selector("text=the last order is still running")
    tab.wait_for_selector("#draw-pictures .thumbnail-item img", timeout=60_000)
    tab.locator("#cancel").click()
    tab.wait_for_selector("#draw-status >> text=stopped;", timeout=10_000)
    kept = tab.locator("#draw-pictures .thumbnail-item img").count()
    assert 1 <= kept < 4
    assert tab.locator("#go").is_enabled()
    set_steps(tab, 2)
    draw(tab)


def test_a_reload_restores_fields_pictures_and_conversation(tab_of) -> None:
    tab = tab_of(DESKTOP)
    tab.locator("#prompt textarea").fill("a blue dog")
    draw(tab, seed="123")
    tab.get_by_role("tab", name="Talk").click()
    tab.locator("#say textarea").fill("hello there")
    tab.locator("#send").click()
    tab.wait_for_selector("#talk-status >> text=done", timeout=60_000)
    tab.reload()
    tab.wait_for_selector("#draw-pictures .thumbnail-item img", timeout=20_000)
    assert tab.locator("#prompt textarea").input_value() == "a blue dog"
    assert tab.locator("#seed input, #seed textarea").first.input_value() == "123"
    assert tab.locator("#earlier .thumbnail-item").count() >= 4
    tab.get_by_role("tab", name="Talk").click()
    tab.wait_for_selector("#chat >> text=hello there")
    other = tab_of(DESKTOP)  # another visitor
    assert other.locator("#earlier .thumbnail-item").count() == 0


def test_a_dropped_png_fills_the_fields(tab_of, tmp_path: Path) -> None:
    tab = tab_of(DESKTOP)
    settings = {"prompt": "a green bird", "seed": 99, "steps": 7, "mode": "flow", "guidance": 3.5, "model": "other"}
    save_png(tmp_path / "like.png", Image.new("RGB", (128, 128)), settings)
    tab.locator("#draw-more >> text=More").click()
    tab.locator("#draw-more input[type=file]").first.set_input_files(tmp_path / "like.png")
    tab.wait_for_selector("#draw-status >> text=the settings are filled in")
    assert "drawn with other" in tab.locator("#draw-status").inner_text()
    assert tab.locator("#prompt textarea").input_value() == "a green bird"
    assert tab.locator("#seed input, #seed textarea").first.input_value() == "99"
    assert tab.locator("#draw-more").get_by_label("Steps").input_value() == "7"
    draw(tab, seed="99")
    with tab.expect_download() as download:
        tab.locator("#draw-pictures .thumbnail-item").first.click()
        tab.locator("#draw-pictures button[aria-label='Download'], #draw-pictures a[download]").first.click()
    assert read_settings(download.value.path())["seed"] == 99
    (tmp_path / "plain.png").write_bytes(png())
    tab.locator("#draw-more input[type=file]").first.set_input_files(tmp_path / "plain.png")
    tab.wait_for_selector("#draw-status >> text=the picture carries no settings")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_it_edits_and_describes(tab_of, viewport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    make = forms.picture_request
    monkeypatch.setattr(forms, "picture_request", lambda *given: masks.append(given[-1]) or make(*given))
    tab = tab_of(viewport)
    (tmp_path / "given.png").write_bytes(png(300, 300))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    tab.get_by_role("tab", name="Edit").click()
    tab.locator("#picture-go").click()
    tab.wait_for_selector("#picture-status >> text=there is no picture")
    tab.locator("#picture-given input[type=file]").first.set_input_files(tmp_path / "given.png")
    tab.locator("#picture-given >> text=Upload an image").wait_for(state="hidden")
    wait_settled(tab, "#picture-given")  # the picture is there, and its zoom was chosen
    tab.locator("#picture-given canvas").first.scroll_into_view_if_needed()  # a phone was scrolled to the results
    wait_settled(tab, "#picture-given")
    canvas = tab.locator("#picture-given canvas").first.bounding_box()
    middle = (canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2)
    tab.mouse.move(*middle)
    tab.mouse.down()
    tab.mouse.move(middle[0] + 20, middle[1] + 10, steps=5)
    tab.mouse.up()
    tab.locator("#instruction textarea").fill("make it blue")
    tab.locator("#picture-go").click()
    tab.wait_for_selector("#picture-status >> text=1 of 1 done", timeout=60_000)
    left, top, right, bottom = masks[-1].getbbox()
    assert 100 < left < 200 and 100 < top < 200 and right - left < 150 and bottom - top < 150  # where the brush was
    wait_in_view(tab, "#picture-pictures .thumbnail-item")
    tab.get_by_role("tab", name="Describe").click()
    give(tab, "#describe-given", tmp_path / "bad.png")
    tab.wait_for_selector("#describe-given img", state="attached")
    tab.locator("#ask").click()
    tab.wait_for_selector("#describe-status >> text=cannot be read as a picture")
    assert "/" not in tab.locator("#describe-status").inner_text()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_talk_survives_errors_and_begins_anew(tab_of, viewport) -> None:
    tab = tab_of(viewport)
    tab.get_by_role("tab", name="Talk").click()
    chat, last = (tab.locator(place).bounding_box() for place in ("#chat", "#new"))
    assert chat["width"] > 0.8 * min(viewport["width"], 1240)
    assert last["x"] + last["width"] <= chat["x"] + chat["width"] + 1  # the buttons end where the column does
    tab.locator("#send").click()
    tab.wait_for_selector("#talk-status >> text=message is empty")
    tab.locator("#say textarea").fill(EVIL)
    tab.locator("#send").click()
    tab.wait_for_selector("#talk-status >> text=done", timeout=60_000)
    assert "<img src=http" in tab.locator("#chat").inner_text()
    assert "are not known" in tab.locator("#talk-status").inner_text()
    tab.locator("#new").click()
    tab.wait_for_selector("#talk-status >> text=Say something")
    assert "<img" not in tab.locator("#chat").inner_text()
    tab.locator("#say textarea").fill("hello")
    tab.locator("#send").click()
    tab.wait_for_selector("#talk-status >> text=done", timeout=60_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_a_closed_tab_stops_its_order(tab_of) -> None:
    tab = tab_of(DESKTOP)
    set_steps(tab, 1000)
    tab.locator("#go").click()
    tab.wait_for_selector("#draw-status >> text=step")
    tab.close()
    end = time.monotonic() + 60
    while any(thread.name == "mm-run" for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(thread.name == "mm-run" for thread in threading.enumerate())


def test_a_click_on_a_word_adds_it_to_the_prompt(tab_of) -> None:
    tab = tab_of(DESKTOP)
    tab.locator("#prompt textarea").fill("a red")
    tab.locator("#words >> text=Words that the model knows").click()
    tab.wait_for_selector("#word-pictures .thumbnail-item img")
    tab.locator("#word-pictures .thumbnail-item").nth(2).click()
    tab.wait_for_function("document.querySelector('#prompt textarea').value == 'a red dog'")
