"""A conversation without any page: messages grow, a stop, an error and a new conversation leave nothing of a turn."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from tiny import says
from tiny_page import png, save_reader

import mm
from mm.core.errors import UserError
from mm.core.png_settings import read_settings
from mm.ui.orders import Orders
from mm.ui.talk import say
from mm.ui.talk_tab import as_chat
from mm.ui.visits import Visit


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return mm.load(save_reader(tmp_path_factory.mktemp("model")))


@pytest.fixture
def orders(engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Orders:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "pictures").mkdir()
    return Orders(engine, tmp_path / "pictures")


def has_said(orders: Orders, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    says(orders.engine._pipeline_for("converse"), monkeypatch, answer)


def waiting(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The model begins no turn before the event is set, so that a turn cannot be over before it is stopped."""
    pipe, go_on = orders.engine._pipeline_for("converse"), threading.Event()
    real = pipe.turn

    def held(*arguments, **options):
        assert go_on.wait(300)
        yield from real(*arguments, **options)

    monkeypatch.setattr(pipe, "turn", held)
    return go_on


def test_words_and_pictures_come_with_their_settings(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = Visit("a")
    last = list(say(orders, visit, "hello, who are you?", None))[-1]
    assert [m["role"] for m in last.messages] == ["user", "assistant"]
    assert last.messages[1]["text"].startswith("I am mm, a small model")
    last = list(say(orders, visit, "draw a cat and a zeppelin <b>![x](http://a.example/b)</b>", None))[-1]
    assert any("zeppelin" in notice for notice in last.progress.notices)
    settings = read_settings(last.messages[-1]["file"])
    assert (settings["seed"], settings["prompt"][:10]) == (visit.seed, "draw a cat")
    has_said(orders, monkeypatch, "two cats")
    last = list(say(orders, visit, "what style is this?", None))[-1]
    assert last.messages[-1]["text"] == "two cats"
    last = list(say(orders, visit, "is it a zebra?", None))[-1]
    assert "do not know what a zebra is" in last.messages[-1]["text"]
    assert any("not understood" in notice for notice in last.progress.notices)
    assert "<" not in as_chat(last.messages)[2]["content"]
    assert as_chat(last.messages)[3]["content"] == {"path": last.messages[3]["file"]}
    visit.forget()
    assert not list(orders.folder.iterdir())


def test_a_given_picture_is_made_smaller_and_a_stopped_turn_leaves_nothing(
    orders: Orders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from PIL import Image

    visit, given = Visit("a"), tmp_path / "cache" / "in.png"
    given.write_bytes(png(3000, 2000))
    has_said(orders, monkeypatch, "yes")
    list(say(orders, visit, "is there a cat?", str(given)))
    assert Image.open(visit.messages[0]["file"]).size == (1024, 683)
    assert visit.messages[1]["text"] == "yes"
    before = visit.conversation.copy()
    stop = waiting(orders, monkeypatch)
    turn = say(orders, visit, "draw a cat", None)
    next(turn)
    visit.cancel()
    stop.set()
    with pytest.raises(UserError, match="stopped"):
        list(turn)
    for words, picture, message in (
        (" ", None, "message is empty"),
        ("x" * 3000, None, "at most 2000"),
        ("hello", str(tmp_path / "cache" / "gone.png"), "no longer on the server"),
        ("hello", str(tmp_path / "outside.png"), "no uploaded file"),
    ):
        with pytest.raises(UserError, match=message):
            list(say(orders, visit, words, picture))
    assert len(visit.messages) == 2 and visit.conversation == before and not visit.busy


def test_a_stop_before_the_first_word_ends_when_the_turn_is_undone(
    orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn has begun and says nothing for a while: the visit is free only once the model works no more."""
    pipe, visit = orders.engine._pipeline_for("converse"), Visit("a")
    real, begun, stopped, ended = pipe.turn, threading.Event(), threading.Event(), threading.Event()

    def slow(*arguments, **options):
        try:
            begun.set()
            assert stopped.wait(300)
            time.sleep(0.3)  # long enough for a turn that does not wait for this one to be over
            yield from real(*arguments, **options)
        finally:
            ended.set()

    monkeypatch.setattr(pipe, "turn", slow)
    turn = say(orders, visit, "draw a cat", None)
    next(turn)
    assert begun.wait(300)
    visit.cancel()
    stopped.set()
    with pytest.raises(UserError, match="stopped"):
        list(turn)
    assert ended.is_set() and visit.conversation.turns == 0


def test_a_new_conversation_frees_a_running_one(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    visit, stop = Visit("a"), waiting(orders, monkeypatch)
    turn = say(orders, visit, "draw a cat", None)
    next(turn)
    visit.new_conversation()
    stop.set()
    said = ["hello", "Hello! What can I draw for you?"]
    assert [m["text"] for m in list(say(orders, visit, "hello", None))[-1].messages] == said
    with pytest.raises(UserError, match="stopped"):
        list(turn)
    assert [m["text"] for m in visit.messages] == said and not visit.busy
