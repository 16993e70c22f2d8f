"""The Talk tab's logic with a tiny pipeline: messages grow, a stop and an error leave nothing, the API converses."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny import says, tiny_reader

from mm import InterleavedPipeline, TextToImagePipeline
from mm.core.errors import UserError
from mm.core.png_settings import read_settings
from mm.ui.studio import Order, Session, Studio
from mm.ui.talk import Talker, Visit


@pytest.fixture
def talker(tmp_path: Path) -> Talker:
    pipe = InterleavedPipeline(**tiny_reader())
    return Talker(pipe, tmp_path, "tiny")


def test_words_grow_and_pictures_come_with_their_settings(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    visit = Visit()
    says(talker.pipe, monkeypatch, "two", "cats", "<end>")
    seen = [m[-1]["text"] for m in ([dict(x) for x in now] for now in talker.say("how many?", None, visit))]
    assert seen == ["how many?", "two", "two cats", "two cats"]
    says(talker.pipe, monkeypatch, "<image>")
    texts = [[dict(x) for x in now][-1]["text"] for now in talker.say("draw a cat", None, visit, steps=2)]
    assert "drawing: step 1 of 2" in texts
    last = visit.messages[-1]
    assert (last["role"], last["text"]) == ("assistant", "")
    assert read_settings(last["file"])["prompt"] == "draw a cat"
    assert read_settings(last["file"])["seed"] == visit.seed
    files = list(talker.folder.iterdir())
    visit.forget()
    assert files and not list(talker.folder.iterdir())


def test_a_given_picture_is_shown_and_a_stopped_turn_leaves_nothing(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    visit, given = Visit(), tmp_path / "in.jpg"
    Image.new("RGB", (300, 200), "red").save(given)
    says(talker.pipe, monkeypatch, "yes", "<end>")
    list(talker.say("is it red?", str(given), visit))
    assert [m["role"] for m in visit.messages] == ["user", "assistant"]
    assert Image.open(visit.messages[0]["file"]).size == (300, 200)
    said = len(visit.conversation.dialogue) if visit.conversation else 0
    says(talker.pipe, monkeypatch, "<image>")
    turn = talker.say("draw a cat", None, visit, steps=5)
    next(turn)
    next(turn)
    visit.stopped.set()
    with pytest.raises(UserError, match="stopped"):
        list(turn)
    assert len(visit.messages) == 2
    assert visit.conversation is not None
    assert len(visit.conversation.dialogue) == said
    with pytest.raises(UserError, match="empty"):
        list(talker.say(" ", None, visit))
    with pytest.raises(UserError, match="no picture at"):
        list(talker.say("hello", str(tmp_path / "gone.png"), visit))
    assert len(visit.messages) == 2


def test_a_cancel_in_the_queue_counts_and_the_next_order_is_drawn(tmp_path: Path) -> None:
    parts = tiny_reader()
    names = ("text_tokenizer", "trunk", "velocity_decoder", "autoencoder", "scheduler")
    studio, session = Studio(TextToImagePipeline(**{n: parts[n] for n in names}), "tiny", tmp_path), Session()
    session.cancelled.set()
    [only] = studio.draw(Order(prompt="a cat", count=2, steps=1), session)
    assert (only.done, only.notes) == (0, ("stopped after 0 of 2 pictures",))
    assert [p.done for p in studio.draw(Order(prompt="a cat", count=2, steps=1), session)] == [1, 2]


def test_the_api_converses(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio_client import Client
    from test_ui import _free_port

    from mm.ui.app import launch

    says(talker.pipe, monkeypatch, "hello", "!", "<end>")
    names = ("text_tokenizer", "trunk", "velocity_decoder", "autoencoder", "scheduler", "code_head", "bridge")
    pipe = TextToImagePipeline(**{n: talker.pipe.components[n] for n in names})
    port = _free_port()
    page = launch(Studio(pipe, "tiny", talker.folder), talker=talker, port=port, block=False)
    try:
        chat, words, _ = Client(f"http://127.0.0.1:{port}", verbose=False).predict("hi", None, api_name="/say")
        assert [m["role"] for m in chat] == ["user", "assistant"]
        assert "hello!" in str(chat[1]["content"])
        assert words == ""
    finally:
        page.close()
