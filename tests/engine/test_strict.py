"""`strict` at every entry: requests, command, Python, conversations, batch rows, the page's forms and its API."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
import tiny_calibration
from tiny import tiny_reader

import mm
from mm.core.errors import UserError
from mm.engine.engine import Engine
from mm.engine.events import Notice, Picture, Words
from mm.engine.requests import Draw, Edit, Turn
from mm.engine.settings import request_of
from mm.ui import api, forms


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("reader") / "model"
    mm.InterleavedPipeline(**tiny_reader()).save_pretrained(folder)
    return mm.load(folder)


def events_of(engine: Engine, request: Draw | Edit | Turn) -> list[object]:
    events: list[object] = []
    engine.run(request).each(events.append)
    return events


def test_the_field_is_frozen_and_checked() -> None:
    for kind in (Draw, Edit, Turn):
        assert {one.name: one.default for one in fields(kind)}["strict"] is None
    with pytest.raises(UserError, match="strict is 'yes'; give true or false"):
        Draw(prompt="a cat", strict="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "strict", "refused"),
    [
        ("a hat", None, False), ("a hat", True, True), ("a hat", False, False),
        ("a black cat", None, False), ("a black cat", True, True), ("a kitty", True, False),
    ],
)  # fmt: skip
def test_drawing(engine: Engine, prompt: str, strict: bool | None, refused: bool) -> None:
    request = Draw(prompt=prompt, seed=1, steps=1, strict=strict)
    if refused:
        with pytest.raises(UserError, match=r"is refused \(strict\)") as refusal:
            events_of(engine, request)
        assert "passed on" not in str(refusal.value)  # nothing is
        return
    events = events_of(engine, request)
    (picture,) = [one for one in events if isinstance(one, Picture)]
    said = " ".join(one.text for one in events[: events.index(picture)] if isinstance(one, Notice))
    assert ("names nothing that the model can draw" in said) is (prompt == "a hat" and strict is None)
    assert ("'hat'" in said) is (prompt == "a hat") and ("'black'" in said) is (prompt == "a black cat")
    assert picture.settings.get("strict") is strict  # so that the picture can be drawn again
    assert request_of(picture.settings, engine.capabilities).strict is strict


@pytest.mark.parametrize(
    ("words", "strict", "refused"),
    [
        ("make the cat black", None, False), ("make the cat black", True, True),
        ("add a cute dog", None, False), ("add a cute dog", True, True), ("add a dog", True, False),
    ],
)  # fmt: skip
def test_editing(engine: Engine, words: str, strict: bool | None, refused: bool) -> None:
    from PIL import Image

    request = Edit(image=Image.new("RGB", (16, 16)), instruction=words, seed=1, steps=1, strict=strict)
    if refused:
        with pytest.raises(UserError, match=r"is refused \(strict\)"):
            events_of(engine, request)
    else:
        events = events_of(engine, request)
        first = next(at for at, one in enumerate(events) if isinstance(one, Picture))
        said = " ".join(one.text for one in events[:first] if isinstance(one, Notice))
        assert ("cannot be carried out as a whole" in said and "'black'" in said) is ("black" in words)


def test_conversation(engine: Engine) -> None:
    for words, strict, drawn in (
        ("draw a hat", None, False),
        ("draw a hat", False, True),
        ("draw a black cat", None, True),
        ("draw a black cat", True, False),
    ):
        talk = Turn(conversation=engine.converse(), words=words, seed=1, steps=1, strict=strict)
        events = events_of(engine, talk)
        reply = "".join(one.text for one in events if isinstance(one, Words))
        assert any(isinstance(one, Picture) for one in events) is drawn
        assert ("I cannot draw this" in reply) is not drawn
        assert drawn is False or any(isinstance(one, Notice) for one in events)


def test_a_model_without_a_list_of_words_refuses_the_field(tmp_path: Path) -> None:
    tiny_calibration.sd("StableDiffusionPipeline").save_pretrained(tmp_path)
    plain = mm.load(tmp_path)
    assert not plain.capabilities.strict
    with pytest.raises(UserError, match=r"strict is True.*no list of words"):
        plain.run(Draw(prompt="a hat", strict=True))


def test_page_and_api(engine: Engine) -> None:
    can = engine.capabilities
    assert forms.draw_request({"prompt": "a hat", "strict": True}, can).strict is True
    assert forms.draw_request({"prompt": "a hat", "strict": False}, can).strict is None
    assert inspect.getsource(api).count("strict: bool = False") == 2  # of draw and of edit


def test_batch_rows(engine: Engine, tmp_path: Path, cli) -> None:
    rows = [("bad", {"prompt": "a hat", "strict": True}), ("strict", {"prompt": "a black cat", "strict": True})]
    rows += [("kept", {"prompt": "a hat"}), ("good", {"prompt": "a cat"})]
    jobs = tmp_path / "jobs.jsonl"
    lines = [{"custom_id": name, "task": "generate", "body": body | {"steps": 1}} for name, body in rows]
    jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cli("batch", str(jobs), "-o", str(tmp_path / "out"), "--model", engine.name, "--batch-size", "4")
    assert done.returncode == 2, done.stderr
    assert sorted(path.name.split("-")[0] for path in tmp_path.rglob("*.png")) == ["000000003", "000000004"]
    assert "'a hat' is refused (strict)" in done.stderr
    assert "'a black cat' is refused (strict)" in done.stderr
