"""Known things that stand in for subjects that are drawn apart: the page's field, and the API's mapping."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from subject_adapters import adapter_of
from subject_pictures import WORDS
from tiny_page import save_reader, served

import mm
from mm.core.errors import UserError
from mm.engine.capabilities import Capabilities
from mm.ui.forms import draw_request

PROMPT = f"a {WORDS[0]} and a {WORDS[1]} on grass"


@pytest.mark.parametrize(
    ("chosen", "written", "wanted"),
    [
        (True, "", True),
        (False, " ", False),
        (True, "<mug>=cup, <robot> = small dog ,", {"<mug>": "cup", "<robot>": "small dog"}),
        ({"<mug>": "cup"}, None, {"<mug>": "cup"}),
        (None, None, False),
    ],
)
def test_a_form_gives_what_a_request_takes(chosen: Any, written: Any, wanted: Any) -> None:
    values = {"prompt": "a <mug>", "count": 1, "apart": chosen, "stand_ins": written}
    assert draw_request(values, Capabilities(model="any", tasks=("draw",))).apart == wanted


@pytest.mark.parametrize(
    ("chosen", "written", "says"),
    [
        (True, "mug", "the field of stand-ins is 'mug'; give a word and a thing"),
        (True, "<mug>=cup, <mug>=dog", "given twice for <mug>"),
        (False, "<mug>=cup", "choose Apart, or empty the field"),
        ({"<mug>": 3}, "", "what stands in for <mug> is 3"),
        ("yes", "", "apart is"),
        (True, 3, "stand-ins is 3"),
    ],
)
def test_what_cannot_stand_in_is_one_line(chosen: Any, written: Any, says: str) -> None:
    values = {"prompt": "a <mug>", "count": 1, "apart": chosen, "stand_ins": written}
    with pytest.raises(UserError, match=says):
        draw_request(values, Capabilities(model="any", tasks=("draw",)))


def test_the_api_takes_the_mapping_and_the_page_has_the_field(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("apart")
    engine = mm.load(save_reader(root / "model"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, word in enumerate(WORDS):
            adapter_of(engine.pipeline, word, k).apply(engine.pipeline)
    (root / "pictures").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "cache"))
        with served(engine, root / "pictures") as at:
            client = Client(at, verbose=False)
            given: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "steps": 1, "api_name": "/draw"}
            things = dict(zip(WORDS, ("dog", "cat"), strict=True))
            for apart in (True, things):
                _, about = client.predict(**given, apart=apart)
                assert [one["apart"] for one in about["settings"]] == [apart]
            with pytest.raises(AppError, match="is no word of an adapter in the prompt"):
                client.predict(**given, apart={"<none>": "dog"})
            labels = [str(one["props"].get("label")) for one in client.config["components"]]
            assert any(label.startswith("Stand-ins") for label in labels)
