"""The page of a public model in a real browser: draws, and changes a picture, with the model's own controls (slow)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_page import CHROMIUM, browser_of, png, served
from tiny_pipelines import SIDE, tiny_pipeline_of

import mm
from mm.core.png_settings import read_settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, and playwright"),
]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    root = tmp_path_factory.mktemp("app")
    tiny_pipeline_of("stable-diffusion-xl").save_pretrained(root / "model")
    engine = mm.load(root / "model", dtype="float32")
    (root / "pictures").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "cache"))
        with served(engine, root / "pictures") as at:
            yield at, root, engine


@pytest.fixture
def tab(app):
    with browser_of() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(app[0])
        page.wait_for_selector("#go")
        yield page


def test_a_picture_is_the_start_of_another(app, tab, tmp_path: Path) -> None:
    _, root, engine = app
    given = tmp_path / "given.png"
    given.write_bytes(png(SIDE, SIDE, "green"))
    tab.get_by_role("tab", name="From a picture").click()
    tab.wait_for_load_state("networkidle")  # the editor of pictures is loaded with its tab
    empty = "#picture-given >> text=Upload an image"
    tab.wait_for_selector(empty)
    tab.locator("#picture-given input[type=file]").first.set_input_files(given)
    tab.wait_for_selector(empty, state="hidden")
    tab.locator("#instruction textarea").fill("a red fox")
    fill(tab, "Seed", "5")
    fill(tab, "Steps", "4")
    before = set((root / "pictures").iterdir())
    tab.locator("#picture-go").click()
    tab.wait_for_selector("#picture-status >> text=1 of 1 done", timeout=60_000)
    (made,) = set((root / "pictures").iterdir()) - before
    settings = read_settings(made)
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("a red fox", 5, 4)
    assert settings.get("strength") is None  # left open: the model's own
    wanted = engine.draw("a red fox", image=Image.open(given).convert("RGB"), seed=5, steps=4)[0]
    assert np.array_equal(np.asarray(Image.open(made).convert("RGB")), np.asarray(wanted))
    fill(tab, "Strength, 0 to 1 (1 = all anew)", "0.1")
    tab.locator("#picture-go").click()
    tab.wait_for_selector("#picture-status >> text=leaves none of 4 steps", timeout=60_000)


def fill(tab, label: str, value: str) -> None:
    """Fills the visible field of a name; opens "More" where it is closed."""
    if not (fields := [one for one in tab.get_by_label(label, exact=True).all() if one.is_visible()]):
        tab.locator("#picture-more >> text=More").first.click()
        tab.get_by_label(label, exact=True).locator("visible=true").first.wait_for()
        fields = [one for one in tab.get_by_label(label, exact=True).all() if one.is_visible()]
    fields[0].fill(value)
    fields[0].press("Tab")
