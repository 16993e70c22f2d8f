"""Conversations on a tiny random model: what each turn is drawn from, stopping, any length, the command."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import says, seeded, tiny_reader

from mm import ImageEditPipeline, InterleavedPipeline, TextToImagePipeline
from mm.core.errors import UserError
from mm.pipelines import conversation as states
from mm.pipelines.best_of import seed_of_try
from mm.pipelines.pictures import to_tensor
from mm.pipelines.self_reader import Shortfall
from mm.world.asked import asked_of

RED = Image.new("RGB", (60, 90), "red")


@pytest.fixture
def pipe():
    made = InterleavedPipeline(**tiny_reader())
    made.set_progress_bar_config(disable=True)
    return made


def kinds(events) -> list[str]:
    return [event.kind for event in events]


def words(events) -> str:
    return " ".join(event.word for event in events if event.kind == "word")


def drawn(events) -> bytes:
    return next(event.picture for event in events if event.picture is not None).tobytes()


def test_an_answer_comes_word_by_word(pipe, monkeypatch):
    says(pipe, monkeypatch, "two cats")
    events = list(pipe.turn(pipe.start(), "what style is this?", RED))
    assert kinds(events) == ["word", "word", "end"]
    assert words(events) == "two cats"


def test_a_new_picture_is_the_one_that_the_drawing_pipeline_draws(pipe):
    parts = {n: p for n, p in pipe.components.items() if not n.startswith("understanding") and n != "latent_stem"}
    alone = TextToImagePipeline(**parts)
    state = pipe.start()
    for k, turn in enumerate(("draw a cat", "please draw a cat!", "another one")):
        events = list(pipe.turn(state, turn, seed=3, steps=2))
        assert kinds(events) == ["step", "step", "picture", "end"]
        options = {"generator": seeded(3 + k)[0], "num_inference_steps": 2, "guidance_scale": pipe.default_guidance[0]}
        assert drawn(events) == alone("a cat", **options).images[0].tobytes()
        assert events[2].seed == 3 + k
    assert len(state.shown) == state.pictures == 3
    torch.testing.assert_close(state.last.tokens, pipe._latent_tokens(state.last.latents))


def test_a_turn_draws_again_what_its_picture_lacks(pipe, monkeypatch):
    """The third of at most four tries is right; it is the picture that the drawing pipeline makes of its seed."""
    asked, found = [], iter([Shortfall(wrong=3, missing=("2 cats",)), Shortfall(wrong=9), Shortfall()])
    monkeypatch.setattr(pipe, "_checker", lambda wanted: asked.append(wanted) or (lambda rows, latents: [next(found)]))
    parts = {n: p for n, p in pipe.components.items() if not n.startswith("understanding") and n != "latent_stem"}
    options = {"num_inference_steps": 2, "guidance_scale": pipe.default_guidance[0]}
    wanted = TextToImagePipeline(**parts)("two cats", generator=seeded(seed_of_try(5, 2))[0], **options).images[0]
    state = pipe.start()
    events = list(pipe.turn(state, "draw two cats", seed=5, steps=2, best_of=4))
    assert kinds(events) == ["step", "step"] * 3 + ["picture", "end"]
    assert (drawn(events), events[6].seed, state.pictures) == (wanted.tobytes(), 5, 1)
    assert asked == [[asked_of("two cats")]]


def test_a_turn_says_what_no_try_shows(pipe, monkeypatch):
    lacks = Shortfall(wrong=3, missing=("2 cats",))
    monkeypatch.setattr(pipe, "_checker", lambda wanted: lambda rows, latents: [lacks if wanted[0] else None])
    with pytest.warns(UserWarning, match=r"the model does not see in any of 2 tries 2 cats \(seed 5\)"):
        list(pipe.turn(pipe.start(), "draw two cats", seed=5, steps=1, best_of=2))
    with pytest.warns(UserWarning, match="not read in full"):
        list(pipe.turn(pipe.start(), "draw a cat in a house", seed=5, steps=1, best_of=2))


def test_a_change_of_a_given_picture_is_the_one_that_the_editing_pipeline_makes(pipe):
    alone = ImageEditPipeline(**{n: p for n, p in pipe.components.items() if n != "latent_stem"})
    state = pipe.start()
    list(pipe.turn(state, "thanks", RED))
    want = pipe.autoencoder.encode(to_tensor([RED], 128))
    torch.testing.assert_close(state.last.latents, want)
    events = list(pipe.turn(state, "could you color the cat blue?", seed=3, steps=2))
    options = {"generator": seeded(3)[0], "num_inference_steps": 2}
    assert drawn(events) == alone(RED, "make the cat blue", **options).images[0].tobytes()
    assert len(pipe._change_branches("make it blue", state.last, 4.0)) == 3


def test_undo_shows_the_picture_before(pipe):
    state = pipe.start()
    assert "nothing to undo" in words(list(pipe.turn(state, "undo"))).lower()
    first = list(pipe.turn(state, "draw a cat", steps=2))
    list(pipe.turn(state, "make it night", steps=2))
    back = list(pipe.turn(state, "undo that"))
    assert kinds(back) == ["picture", "end"]
    assert drawn(back) == drawn(first)
    assert (back[0].seed, state.pictures, len(state.shown)) == (0, 2, 1)


@pytest.mark.parametrize("turn", ["how many cats are there?", "draw a dog", "make it night", "hello there"])
def test_a_stopped_turn_leaves_no_trace(pipe, monkeypatch, turn):
    state = pipe.start()
    list(pipe.turn(state, "draw a cat", steps=2))
    says(pipe, monkeypatch, "two cats")
    before = state.copy()
    stopped = pipe.turn(state, turn, steps=2)
    next(stopped)
    stopped.close()
    assert state == before
    monkeypatch.setattr(pipe, "_decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(pipe.turn(state, "draw a dog", steps=2))
    assert state == before


def test_a_conversation_may_have_any_length_and_what_it_forgets_is_said(pipe, monkeypatch):
    monkeypatch.setattr(states, "MAX_SHOWN", 2)
    state = pipe.start()
    first = list(pipe.turn(state, "draw a cat", steps=1))
    with monkeypatch.context() as patched:
        says(pipe, patched, "two")
        for _ in range(40):
            assert words(pipe.turn(state, "how many cats are there?")) == "two"
    second = list(pipe.turn(state, "draw a cat on grass", steps=1))
    assert drawn(second) != drawn(first)
    with pytest.warns(UserWarning, match="the oldest is forgotten"):
        list(pipe.turn(state, "draw a dog", steps=1))
    assert (state.turns, state.pictures, len(state.shown)) == (43, 3, 2)


def test_an_empty_turn_and_what_is_no_picture_are_named(pipe):
    with pytest.raises(UserError, match="the turn is empty"):
        list(pipe.turn(pipe.start(), "  "))
    with pytest.raises(UserError, match="a turn is a text"):
        list(pipe.turn(pipe.start(), 3))
    state = pipe.start()
    with pytest.raises(UserError, match="no picture at"):
        list(pipe.turn(state, "what is it?", "none.png"))
    assert state == pipe.start()


def test_scripts_run_through_python_and_the_command(pipe, tmp_path, cli):
    out = pipe.chat(["hello", "draw a cat"], steps=2)
    assert out[0] == ("Hello! What can I draw for you?", None)
    assert out[1][0] == "" and out[1][1] is not None
    pipe.save_pretrained(tmp_path / "model")
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    script = f"hello\n/image {picture}\nwhat is it?\n/new\n/quit\nnever said\n"
    command = ["chat", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    done = cli(*command, "--steps", "1", given=script)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    wrong = cli(*command, given="/image none.png\n/image\n/what\n")
    assert wrong.returncode == 1
    assert "no picture at none.png" in wrong.stderr
    assert "/image names no file; write /image FILE" in wrong.stderr
    assert "unknown command '/what'" in wrong.stderr


def test_seeds_of_a_conversation_stay_those_that_a_file_can_hold(pipe):
    state = pipe.start()
    seeds = [
        event.seed
        for turn in ("draw a cat", "another one")
        for event in pipe.turn(state, turn, seed=2**32 - 1, steps=1)
        if event.kind == "picture"
    ]
    assert seeds == [2**32 - 1, 0]
