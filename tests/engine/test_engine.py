"""`mm.load` and `Engine.run`: ours and diffusers' pipelines, seeds, cancelling, two runs at once, wrong requests."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import tiny_calibration
import torch
from PIL import Image
from tiny import tiny_pipeline

import mm
from mm.core.errors import UserError
from mm.engine import calls, memory, output
from mm.engine.capabilities import Capabilities
from mm.engine.changes import unchanged
from mm.engine.events import CancelToken, Done, Notice, Picture, RunCancelledError, Step
from mm.engine.facts import capabilities_of
from mm.engine.outline import capabilities_at
from mm.engine.previews import unpacked
from mm.engine.requests import Describe, Draw, Edit
from mm.engine.serial import FairLock
from mm.engine.settings import request_of, scheduler_named
from mm.families import family_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders: ours, SDXL, and an image-to-image pipeline of Stable Diffusion."""
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(root / "ours")
    tiny_calibration.sdxl().save_pretrained(root / "sdxl")
    tiny_calibration.sd("StableDiffusionPipeline").save_pretrained(root / "sd")
    return root


@pytest.fixture(scope="module")
def ours(folders):
    return mm.load(folders / "ours")


@pytest.fixture(scope="module")
def sdxl(folders):
    return mm.load(folders / "sdxl", dtype="float32")


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


def test_capabilities_are_known_without_weights(folders, ours, sdxl):
    for name, engine in (("ours", ours), ("sdxl", sdxl)):
        assert capabilities_at(folders / name, engine.name) == engine.capabilities


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler"),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("ddim", "DDIMScheduler"),
        ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
        ("magic", None),
    ],
)
def test_samplers_of_other_programs_are_known(sdxl, name, kind):
    assert scheduler_named(name, sdxl.capabilities) == kind


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


@pytest.mark.parametrize(
    ("request_of_it", "message"),
    [
        ({"prompt": "x", "size": (100, 100)}, "draws .* only"),
        ({"prompt": "x", "mode": "magic"}, "mode is 'magic'; .* has the modes flow, codes"),
        ({"prompt": "x", "scheduler": "Nothing"}, "scheduler is 'Nothing'"),
        ({"prompt": "x", "image": Image.new("RGB", (8, 8))}, "cannot draw from a picture; it can: draw"),
        ({"prompt": "x", "steps": 0}, "steps is 0; give a whole number from 1"),
        ({"prompt": "x", "guidance": float("nan")}, "guidance is nan"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x" * 30_000}, "has 30000 characters"),
        ({"prompt": "x", "strength": 0.5}, "without image"),
        ({"prompt": "x", "mask": Image.new("L", (8, 8))}, "without image"),
        ({"prompt": 7}, "prompt is 7; give a text"),
    ],
)
def test_wrong_requests_are_named_before_anything_is_drawn(ours, request_of_it, message):
    with pytest.raises(UserError, match=message):
        ours.run(Draw(**request_of_it))


def test_wrong_models_are_named(folders, tmp_path):
    with pytest.raises(UserError, match="no model 'nothing'"):
        mm.load("nothing")
    with pytest.raises(UserError, match="bits is 3"):
        mm.load(folders / "ours", bits=3)
    with pytest.raises(UserError, match="device is 'tpu'"):
        mm.load(folders / "ours", device="tpu")
    with pytest.raises(UserError, match="dtype is 'int3'"):
        mm.load(folders / "ours", dtype="int3")
    with pytest.raises(UserError, match="offload is 'model'"):
        mm.load(folders / "ours", device="cpu", offload="model")
    (tmp_path / "x.ckpt").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        mm.load(tmp_path / "x.ckpt")


def test_an_estimate_counts_the_weights(folders):
    engine = mm.load(folders / "sdxl", dtype="float32")
    found = memory.estimate(folders / "sdxl")
    count = sum(
        p.numel()
        for part in engine.pipeline.components.values()
        if hasattr(part, "parameters")
        for p in part.parameters()
    )
    assert abs(found.sixteen - 2 * count) < 0.02 * found.sixteen
    assert found.four < found.sixteen
    assert memory.choose_offload(10, 5, 1 << 40)[0] == "none"
    assert memory.choose_offload(30 << 30, 8 << 30, 16 << 30)[0] == "model"
    assert memory.choose_offload(60 << 30, 40 << 30, 16 << 30)[0] == "group"


def test_a_strength_that_leaves_no_step_is_refused(sdxl):
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(UserError, match=r"a strength of 0.2 leaves none of 4 steps; give a strength of at least 0.25"):
        sdxl.draw("a fox", image=picture, strength=0.2, steps=4, seed=1)


def test_waiting_runs_come_in_order():
    lock, order = FairLock(), []
    with lock:
        threads = [threading.Thread(target=_take, args=(lock, order, k)) for k in range(5)]
        for k, thread in enumerate(threads):
            thread.start()
            while len(lock._waiting) <= k:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(5))


def test_a_run_that_waits_is_cancelled_at_once_and_leaves_the_queue():
    lock, token = FairLock(), CancelToken()
    with lock:
        threading.Timer(0.1, token.cancel).start()
        with pytest.raises(RunCancelledError), lock.turn(token):
            pass
        assert not lock._waiting
    with lock.turn(CancelToken()):
        assert lock._taken
    assert not lock._taken


def _take(lock: FairLock, order: list, k: int) -> None:
    with lock:
        order.append(k)


def test_packed_latents_are_laid_out_as_flux_packs_them():
    from diffusers import FluxPipeline

    x = torch.arange(2 * 16 * 6 * 8.0).reshape(2, 16, 6, 8)
    packed = FluxPipeline._pack_latents(x, 2, 16, 6, 8)
    assert torch.equal(unpacked(packed, 16, (64, 48)), x)


def test_capabilities_of_an_unknown_pipeline_come_from_its_call():
    class Unknown:
        def __call__(self, prompt, height=None, width=None, guidance_scale=3.0, num_inference_steps=9): ...

    can = capabilities_of("unknown", Unknown(), None)
    assert can.tasks == ("draw",)
    assert (can.guidance_name, can.negative, can.fixed_size) == ("guidance_scale", False, False)
    with pytest.raises(UserError, match="takes no negative prompt"):
        can.check(Draw(prompt="x", negative="y"))
    with pytest.raises(UserError, match="cannot edit by an instruction"):
        can.check(Edit(image=Image.new("RGB", (8, 8)), instruction="x"))
    with pytest.raises(UserError, match="cannot read pictures"):
        Capabilities(model="m", tasks=("draw",)).check(Describe(image=Image.new("RGB", (8, 8))))


def test_families_give_defaults(ours, sdxl):
    assert (ours.capabilities.steps["codes"], ours.capabilities.guidance) == (32, 5.5)
    assert family_of(sdxl.pipeline).name == "stable-diffusion-xl"
    assert sdxl.capabilities.negative
