"""Conversations on a tiny random model: what is read once, who decides, stopping, limits, the command."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny import says, tiny_reader

from mm import InterleavedPipeline
from mm.core.errors import UserError
from mm.pipelines.pictures import to_tensor


@pytest.fixture
def pipe():
    made = InterleavedPipeline(**tiny_reader())
    made.set_progress_bar_config(disable=True)
    return made


def kinds(events) -> list[str]:
    return [event.kind for event in events]


def test_words_come_one_by_one_until_the_end(pipe, monkeypatch):
    says(pipe, monkeypatch, "two", "cats", "<end>")
    conversation = pipe.start()
    events = list(pipe.turn(conversation, "how many cats are there?"))
    assert [e.word for e in events if e.kind == "word"] == ["two", "cats"]
    assert events[-1].kind == "end"
    assert conversation.read == len(conversation.dialogue.ids)


def test_the_text_head_decides_to_draw_and_the_picture_is_added(pipe, monkeypatch):
    says(pipe, monkeypatch, "<image>")
    conversation = pipe.start()
    events = list(pipe.turn(conversation, "draw a cat", seed=3, steps=2))
    assert kinds(events) == ["step", "step", "picture", "end"]
    assert events[2].picture.size == (128, 128)
    placeholder = conversation.dialogue.token("<look>")
    assert conversation.dialogue.ids.count(placeholder) == 16
    assert conversation.latents.shape == (1, 16, 8, 8)
    # encoding piece by piece equals encoding at once, with understanding tokens of the latents
    tokens = pipe._latent_tokens(conversation.latents)
    _, whole = pipe.trunk.read(torch.tensor([conversation.dialogue.ids]), None, tokens)
    for a, b in zip(conversation.state.prompt.keys, whole.prompt.keys, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_same_seed_same_conversation_and_the_last_picture_is_the_source(pipe, monkeypatch):
    def two(seed):
        says(pipe, monkeypatch, "<image>", "<end>")
        conversation = pipe.start()
        events = list(pipe.turn(conversation, "draw a cat", seed=seed, steps=2))
        first = next(e.picture for e in events if e.picture)
        return first, conversation

    (a, one), (b, _), (c, _) = two(3), two(3), two(4)
    assert a.tobytes() == b.tobytes()
    assert a.tobytes() != c.tobytes()
    prompt = one.state.prompt
    with_source = pipe._conversation_branches(prompt, one.latents, 4.0)
    without = pipe._conversation_branches(prompt, None, 4.0)
    assert (len(with_source), len(without)) == (3, 2)


def test_a_picture_of_the_user_is_encoded(pipe, monkeypatch):
    says(pipe, monkeypatch, "<end>")
    conversation = pipe.start()
    list(pipe.turn(conversation, "what is it?", Image.new("RGB", (60, 90), "red")))
    want = pipe.autoencoder.encode(to_tensor([Image.new("RGB", (60, 90), "red")], 128))
    torch.testing.assert_close(conversation.latents, want)
    assert conversation.dialogue.ids.count(conversation.dialogue.token("<look>")) == 16


def test_a_stopped_turn_leaves_no_trace(pipe, monkeypatch):
    says(pipe, monkeypatch, "two", "<end>", "one", "cat", "dog", "<end>")
    conversation = pipe.start()
    list(pipe.turn(conversation, "hello"))
    before = (list(conversation.dialogue.ids), conversation.read, conversation.state)
    stopped = pipe.turn(conversation, "how many cats are there?")
    assert next(stopped).kind == "word"
    stopped.close()
    assert (conversation.dialogue.ids, conversation.read, conversation.state) == before


def test_a_full_conversation_says_so_and_stays_usable(pipe):
    conversation = pipe.start()
    conversation.dialogue.add([5] * 200)
    with pytest.raises(UserError, match="start a new one"):
        list(pipe.turn(conversation, "draw a cat on grass"))
    assert len(conversation.dialogue.ids) == 201
    with pytest.raises(UserError, match="the prompt is empty"):
        list(pipe.turn(pipe.start(), "  "))


def test_scripts_run_through_python_and_the_command(pipe, tmp_path):
    out = pipe.chat(["hello", "draw a cat"], steps=2)
    assert len(out) == 2
    pipe.save_pretrained(tmp_path / "model")
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    script = f"hello\n/image {picture}\nwhat is it?\n/new\n/quit\nnever said\n"
    command = [sys.executable, "-m", "mm", "chat", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "--steps", "1"], input=script, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    wrong = subprocess.run(command, input="/image none.png\n/what\n", capture_output=True, text=True, timeout=180)
    assert wrong.returncode == 1
    assert "no picture at none.png" in wrong.stderr
    assert "unknown command '/what'" in wrong.stderr
