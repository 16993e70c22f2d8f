"""`mm.load` and `Engine.run`: ours and diffusers' pipelines, seeds, cancelling, two runs at once, wrong requests."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import mm
from mm.core.errors import UserError
from mm.engine import calls, output
from mm.engine.changes import unchanged
from mm.engine.events import CancelToken, Done, Notice, Picture, Step
from mm.engine.previews import unpacked
from mm.engine.requests import Draw
from mm.engine.settings import request_of


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", ["ours", "sdxl"])
def test_picture_k_has_seed_plus_k_at_any_batch_size(request, name):
    engine = request.getfixturevalue(name)
    size = {} if name == "ours" else {"size": (64, 64)}
    alone = [engine.draw("a cat on grass", seed=5 + k, steps=2, **size)[0] for k in range(3)]
    for batch in (1, 3):
        together = engine.draw("a cat on grass", seed=5, count=3, steps=2, batch_size=batch, **size)
        for one, other in zip(alone, together, strict=True):
            assert abs(pixels(one) - pixels(other)).max() <= 2


def test_it_draws_what_diffusers_draws(sdxl):
    """The same picture as the pipeline's own call with the same generator."""
    got = sdxl.draw("a cat", seed=3, steps=2, size=(64, 64), guidance=4.0)[0]
    pipe = sdxl.pipeline
    want = pipe(
        prompt="a cat", num_inference_steps=2, height=64, width=64, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert np.array_equal(pixels(got), pixels(want))


def test_events_come_in_order_and_settings_draw_the_picture_again(ours):
    events = list(ours.run(Draw(prompt="a cat on grass", seed=7, steps=2, count=2)))
    assert [type(e) for e in events] == [Step, Step, Picture, Step, Step, Picture, Done]
    picture = events[5]
    assert (picture.index, picture.seed, events[-1].pictures) == (1, 8, 2)
    again = request_of(picture.settings, ours.capabilities)
    assert np.array_equal(pixels(next(iter(ours.draw(**_fields(again))))), pixels(picture.picture))


def _fields(request: Draw) -> dict:
    return {key: value for key, value in request.__dict__.items() if key != "options"}


def test_warnings_are_events_each_once(ours):
    events = list(ours.run(Draw(prompt="a cat and a zzyzx", seed=1, steps=1, count=3)))
    assert [type(e) for e in events].count(Notice) == 1
    assert isinstance(events[0], Notice)  # before anything is drawn


@pytest.mark.parametrize("name", ["ours", "sdxl"])
def test_a_cancel_stops_within_a_step_and_keeps_what_is_finished(request, name):
    engine, token = request.getfixturevalue(name), CancelToken()
    size = {} if name == "ours" else {"size": (64, 64)}
    events = []

    def stop_in_the_second_step(event):
        events.append(event)
        if len([e for e in events if isinstance(e, Step)]) == 2:
            token.cancel()

    engine.run(Draw(prompt="a cat", seed=1, steps=5, count=3, **size), token).each(stop_in_the_second_step)
    assert len([event for event in events if isinstance(event, Step)]) == 2
    assert events[-1] == Done(pictures=0, cancelled=True)
    assert len(engine.draw("a cat", seed=1, steps=1, **size)) == 1  # the engine draws on


def test_each_draws_in_the_callers_thread_what_reading_gives(ours):
    request = Draw(prompt="a cat", seed=3, count=2, steps=2)
    read, called = list(ours.run(request)), []
    threads = set()

    def keep(event):
        threads.add(threading.get_ident())
        called.append(event)

    ours.run(request).each(keep)
    assert threads == {threading.get_ident()}
    assert [type(event) for event in called] == [type(event) for event in read]
    pictures = ([e for e in events if isinstance(e, Picture)] for events in (read, called))
    for one, other in zip(*pictures, strict=True):
        assert np.array_equal(np.asarray(one.picture), np.asarray(other.picture))
        assert one.settings == other.settings

    def refuse(event):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ours.run(request).each(refuse)
    assert len(ours.draw("a cat", seed=3, steps=2)) == 1  # the turn was given back


def test_who_stops_reading_cancels(ours):
    run = ours.run(Draw(prompt="a cat", seed=1, steps=30, count=50))
    next(run)
    run.close()
    assert not [t for t in threading.enumerate() if t.name == "mm-run"]


def test_two_runs_interleave_without_touching_each_other(sdxl):
    """Other steps, guidance and scheduler state; each picture is what it is alone."""
    wanted = [sdxl.draw("a cat", seed=1, steps=3, guidance=2.0, size=(64, 64), count=2)]
    wanted += [sdxl.draw("two dogs", seed=9, steps=2, guidance=6.0, size=(64, 64), count=2)]
    runs = [
        sdxl.run(Draw(prompt="a cat", seed=1, steps=3, guidance=2.0, size=(64, 64), count=2)),
        sdxl.run(Draw(prompt="two dogs", seed=9, steps=2, guidance=6.0, size=(64, 64), count=2)),
    ]
    got: list[list[Image.Image]] = [[], []]
    for pair in itertools.zip_longest(*runs):
        for k, event in enumerate(pair):
            if isinstance(event, Picture):
                got[k].append(event.picture)
    for mine, theirs in zip(wanted, got, strict=True):
        assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(mine, theirs, strict=True))


def test_nothing_of_a_run_stays_on_the_pipeline(sdxl):
    before = {k: v for k, v in sdxl.pipeline.__dict__.items() if not isinstance(v, torch.nn.Module)}
    config = dict(sdxl.pipeline.scheduler.config)
    sdxl.draw("a cat", seed=1, steps=2, size=(64, 64), scheduler="DDIMScheduler")
    after = {k: v for k, v in sdxl.pipeline.__dict__.items() if not isinstance(v, torch.nn.Module)}
    assert before.keys() == after.keys()
    assert type(sdxl.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert dict(sdxl.pipeline.scheduler.config) == config


def test_image_to_image_shares_the_modules(folders):
    engine = mm.load(folders / "sd", dtype="float32")
    assert {"draw", "image_to_image"} <= set(engine.capabilities.tasks)
    source = Image.new("RGB", (64, 64), "red")
    made = engine.draw("a cat", image=source, strength=0.5, seed=1, steps=4)
    assert made[0].size == (64, 64)
    assert engine._pipeline_for("image_to_image").unet is engine.pipeline.unet


def test_pipelines_of_other_tasks_keep_the_type_of_the_shared_modules(folders):
    """diffusers' `from_pipe` casts them to float32: twice the memory, and other pictures from then on."""
    engine = mm.load(folders / "sd", dtype="bfloat16")
    source = Image.new("RGB", (64, 64), "red")
    engine.draw("a cat", image=source, strength=0.5, seed=1, steps=2)
    assert {p.dtype for p in engine.pipeline.unet.parameters()} == {torch.bfloat16}


def test_requests_that_differ_in_prompt_and_seed_alone_share_calls(sdxl, monkeypatch):
    """Each picture is the one of its prompt and seed, in the order of the requests."""
    sizes, called = [], calls.draw
    monkeypatch.setattr(
        calls, "draw", lambda view, a, seeds, **k: (sizes.append(len(seeds)), called(view, a, seeds, **k))[1]
    )
    common = {"steps": 2, "size": (64, 64)}
    requests = [Draw(prompt=text, seed=k, **common) for k, text in enumerate(("a cat", "two dogs", "a cat"))]
    requests.insert(1, Draw(prompt="a cat", seed=9, steps=1, size=(64, 64)))
    made = {e.index: e.picture for e in sdxl.run_all(requests, batch_size=8) if isinstance(e, Picture)}
    assert sizes == [3, 1]
    for k, request in enumerate(requests):
        alone = sdxl.draw(request.prompt, seed=request.seed, steps=request.steps, size=(64, 64))[0]
        assert abs(pixels(made[k]) - pixels(alone)).max() <= 2


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP")])
def test_files_hold_what_their_suffix_says(tmp_path, suffix, kind):
    path = tmp_path / f"a{suffix}"
    output.save_file(path, Image.new("RGBA", (8, 8), "red"), {"prompt": "a cat, red", "seed": 7})
    with Image.open(path) as made:
        assert made.format == kind
        comment = made.getexif().get_ifd(0x8769).get(0x9286)
        assert kind == "PNG" or "a cat, red" in comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    with pytest.raises(UserError, match="exists"):
        output.save_file(path, Image.new("RGB", (8, 8)), None)


def test_an_edit_that_changes_nothing_is_seen():
    noise = np.random.default_rng(0).integers(0, 8, (64, 64, 3)).astype(np.uint8)
    source = Image.fromarray(np.full((64, 64, 3), 100, np.uint8))
    moved = Image.fromarray(np.asarray(source) + noise)
    assert unchanged(source, moved)
    moved.paste("red", (8, 8, 16, 16))
    assert not unchanged(source, moved)
    assert not unchanged(source, Image.new("RGB", (64, 64), (130, 130, 130)))


def test_packed_latents_are_laid_out_as_flux_packs_them():
    from diffusers import FluxPipeline

    x = torch.arange(2 * 16 * 6 * 8.0).reshape(2, 16, 6, 8)
    packed = FluxPipeline._pack_latents(x, 2, 16, 6, 8)
    assert torch.equal(unpacked(packed, 16, (64, 48)), x)
