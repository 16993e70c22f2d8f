"""Several subjects in one picture, each drawn by its own adapter: what is kept of which run, on any family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler
from PIL import Image, ImageChops
from subject_adapters import adapter_of
from subject_pictures import WORDS
from tiny_pipelines import SIDE, arguments_of, tiny_pipeline_of
from torch import Tensor

from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.customization import apart, apart_base, layouts
from mm.customization.apart import draw_apart
from mm.customization.apart_base import OnLatents, Subjects
from mm.customization.objectives.protocol import objective_of
from mm.customization.places import Box, Noised, are_apart, cells_of, in_whole, share_inside
from mm.engine import weighting
from mm.engine.engine import Engine
from mm.engine.facts import capabilities_of
from mm.families import family_of, stepping

LEFT, RIGHT = Box(left=0.0, top=0.0, right=0.5, bottom=0.75), Box(left=0.5, top=0.0, right=1.0, bottom=0.5)
PROMPT = f"a {WORDS[0]} and a {WORDS[1]} on grass"
FAMILIES = (
    "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "qwen-image", "sana", "z-image",
    "aura-flow", "cogview-4", "wan", "hunyuan-image", "bria",
    "hunyuan-dit", "pixart-sigma", "sana-sprint",
)  # fmt: skip


@pytest.fixture
def held_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subjects are in the left half and in the upper right quarter, and are always seen."""
    places = dict(zip(WORDS, (LEFT, RIGHT), strict=True))
    monkeypatch.setattr(apart_base, "box_of", _box_by_order(places))
    monkeypatch.setattr(apart, "share_inside", lambda *_: 1.0)
    monkeypatch.setattr(layouts, "crowding", lambda _: 0.0)  # the base draws once


def _box_by_order(places: dict[str, Box]) -> Any:
    calls = iter(list(places.values()) * 100)
    return lambda *_: next(calls)


def spied(pipe: Any) -> list[Tensor]:
    """The latents that the VAE gets, of each picture."""
    seen: list[Tensor] = []
    decode = pipe.vae.decode

    def watched(latents: Tensor, *args: Any, **more: Any) -> Any:
        seen.append(latents.detach().clone())
        return decode(latents, *args, **more)

    pipe.vae.decode = watched
    return seen


def engine_of(family: str) -> Engine:
    """An engine on a tiny model with two adapters on it."""
    pipe = tiny_pipeline_of(family)
    for k, word in enumerate(WORDS):
        adapter_of(pipe, word, k).apply(pipe)
    can = capabilities_of(family, pipe, family_of(pipe), None)
    return Engine(pipe, can, name=family, pipeline_for=lambda _: pipe)


def sampling_of(family: str) -> dict[str, Any]:
    """Settings of a request for such an engine."""
    fields = ("num_inference_steps", "height", "width", "guidance_scale")
    options = {key: value for key, value in options_for(family).items() if key not in fields}
    return {"steps": 3, "size": (SIDE, SIDE), "options": options}


def options_for(family: str) -> dict[str, Any]:
    given = arguments_of(family)
    drop = ("prompt", "generator", "output_type", "image", "mask_image", "negative_prompt")
    return {key: value for key, value in given.items() if key not in drop}


@pytest.mark.filterwarnings("ignore:patch .* does not say")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_adapter_draws_in_its_place_and_nothing_else_changes(family: str, held_places: None) -> None:
    pipe = tiny_pipeline_of(family)
    pipe.set_progress_bar_config(disable=True)
    adapters = [adapter_of(pipe, word, k) for k, word in enumerate(WORDS)]
    seen, options = spied(pipe), options_for(family)
    first = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, refine=0, **options)
    assert len(seen) == 3 and stack_of(pipe).names() == ()
    base, one, both = (latents.squeeze(2) if latents.ndim == 5 else latents for latents in seen)
    height, width = base.shape[-2:]
    left, right = cells_of([LEFT, RIGHT], height, width)
    assert torch.equal(base[..., ~left], one[..., ~left]) and not torch.allclose(base[..., left], one[..., left])
    assert torch.equal(one[..., ~right], both[..., ~right])
    assert not torch.allclose(base[..., right], both[..., right])
    again = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, refine=0, **options)
    assert list(again.picture.getdata()) == list(first.picture.getdata())
    assert list(first.places) == list(WORDS) and first.plain != PROMPT
    assert all(thing in first.plain for thing in first.stand_ins.values())


@pytest.mark.filterwarnings("ignore:patch .* does not say")
@pytest.mark.parametrize("family", ["wan"])
def test_the_picture_is_the_same_by_the_scheduler(
    family: str, held_places: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same picture, to the last bit, where the pipeline's callback is not used."""
    pipe = tiny_pipeline_of(family)
    adapters = [adapter_of(pipe, word, k) for k, word in enumerate(WORDS)]
    options = options_for(family) | {"num_inference_steps": 4}
    by_callback = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, **options).picture
    monkeypatch.setattr(stepping, "_takes_callback", lambda _: False)
    by_scheduler = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, **options).picture
    assert by_callback.tobytes() == by_scheduler.tobytes()
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.filterwarnings("ignore:patch .* does not say")
@pytest.mark.parametrize("family", ["flux"])
def test_a_watched_family_is_drawn_apart_as_by_its_own_objective(
    family: str, held_places: None, without_objective: Any
) -> None:
    pipe = tiny_pipeline_of(family)
    adapters = [adapter_of(pipe, word, k) for k, word in enumerate(WORDS)]
    options = options_for(family) | {"num_inference_steps": 4}
    own = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, **options).picture
    can = capabilities_of(family, without_objective(pipe), family_of(pipe), None)
    watched = draw_apart(pipe, PROMPT, adapters=adapters, seed=5, **options).picture
    assert can.apart and max(high for _, high in ImageChops.difference(own, watched).getextrema()) <= 1


def test_a_pipeline_without_steps_is_refused() -> None:
    pipe = tiny_pipeline_of("pixart-sigma")
    pipe.register_modules(scheduler=None)
    with pytest.raises(UserError, match="PixArtSigmaPipeline has neither a step callback nor a scheduler"):
        draw_apart(pipe, PROMPT, **options_for("pixart-sigma"))


@pytest.mark.filterwarnings("ignore:patch .* does not say")
def test_an_adapter_without_a_word_in_the_prompt_acts_in_every_run(held_places: None) -> None:
    pipe = tiny_pipeline_of("stable-diffusion")
    pipe.set_progress_bar_config(disable=True)
    adapters = [adapter_of(pipe, word, k) for k, word in enumerate(WORDS)]
    seen, options = spied(pipe), options_for("stable-diffusion")
    draw_apart(pipe, PROMPT, adapters=adapters, seed=5, refine=0, **options)
    plain = seen[0]
    adapter_of(pipe, "", 9).apply(pipe, 0.5)
    draw_apart(pipe, PROMPT, adapters=adapters, seed=5, refine=0, **options)
    assert not torch.allclose(plain, seen[3])
    assert [(item.name, item.scale) for item in stack_of(pipe).list()] == [("adapter-", 0.5)]


@pytest.mark.parametrize("packed", [False, True])
def test_the_picture_has_each_subject_of_its_own_run(packed: bool, held_places: None) -> None:
    """Runs of known latents, step by step: what lies outside a place is the base's, also before the last step."""
    pipe = tiny_pipeline_of("stable-diffusion")
    for k, word in enumerate(WORDS):
        adapter_of(pipe, word, k).apply(pipe)
    steps, runs = 3, []

    def call(text: str, seed: int, on_latents: OnLatents) -> Image.Image:
        words = [k for k, word in enumerate(WORDS) if word in text]
        shape = (1, 8, 2) if packed else (1, 2, 2, 4)
        came = []
        for step in range(steps):
            value = 10.0 * len(runs) + step
            latents = torch.full(shape, value)
            made = on_latents(step, latents, 1000.0 * (1 - step / steps))
            came.append(latents if made is None else made)
        runs.append((words, came))
        return Image.new("RGB", (64, 32))

    words = {word: f"adapter-{word}" for word in WORDS}
    apart.compose(pipe, Subjects(prompt=PROMPT, words=WORDS, seed=0), call, words, refine=0)
    assert [words for words, _ in runs] == [[], [0], [1]]
    one, two = runs[1][1], runs[2][1]

    def grid(latents: Tensor) -> list[list[float]]:
        return (latents[0, :, 0].reshape(2, 4) if packed else latents[0, 0]).tolist()

    mine = in_whole(LEFT, 64, 32), in_whole(RIGHT, 64, 32)
    owners = torch.zeros(2, 4, dtype=torch.int)
    for k, mask in enumerate(cells_of(list(mine), 2, 4), 1):
        owners[mask] = k
    assert owners.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]  # of a picture twice as wide as high
    for step in range(steps):
        assert grid(one[step]) == [[10.0 + step if k == 1 else step for k in row] for row in owners.tolist()]
        last = step == steps - 1
        assert grid(two[step]) == [
            [20.0 + step if k == 2 else 10.0 + step if k == 1 and last else step for k in row]
            for row in owners.tolist()
        ]


def test_a_cell_of_two_boxes_belongs_to_the_nearer_one() -> None:
    wide, narrow = Box(left=0.0, top=0.0, right=1.0, bottom=1.0), Box(left=0.75, top=0.0, right=1.0, bottom=0.5)
    one, two = cells_of([wide, narrow], 4, 4)
    assert not (one & two).any() and (one | two).all() and two.nonzero().tolist() == [[0, 3], [1, 3]]


def test_shares_and_squares() -> None:
    field = torch.zeros(4, 4)
    field[:2, :2], field[3, 3] = 1.0, 4.0
    assert share_inside(field, Box(left=0.0, top=0.0, right=0.5, bottom=0.5)) == pytest.approx(0.5)
    assert in_whole(LEFT, 200, 100) == Box(left=0.25, top=0.0, right=0.5, bottom=0.75)
    assert in_whole(LEFT, 100, 200) == Box(left=0.0, top=0.25, right=0.5, bottom=0.625)
    assert are_apart([LEFT, RIGHT])
    assert not are_apart([LEFT, Box(left=0.0, top=0.0, right=0.4, bottom=0.4)])


def test_a_subject_that_is_not_seen_is_drawn_again(monkeypatch: pytest.MonkeyPatch, held_places: None) -> None:
    pipe = tiny_pipeline_of("stable-diffusion")
    for k, word in enumerate(WORDS):
        adapter_of(pipe, word, k).apply(pipe)
    shares = iter((0.9, 0.1, 0.9, 0.8))  # of two tries
    monkeypatch.setattr(apart, "share_inside", lambda *_: next(shares))
    seeds = []

    def call(text: str, seed: int, on_latents: OnLatents) -> Image.Image:
        on_latents(0, torch.zeros(1, 4, 2, 2), 999.0)
        seeds.append(seed)
        return Image.new("RGB", (SIDE, SIDE), (len(seeds), 0, 0))

    words = {word: f"adapter-{word}" for word in WORDS}
    made = apart.compose(pipe, Subjects(prompt=PROMPT, words=WORDS, seed=3), call, words, refine=0)
    assert len(seeds) == 6 and seeds[:3] == [3] * 3 and len(set(seeds[3:])) == 1 and seeds[3] != 3
    assert made.picture.getpixel((0, 0)) == (6, 0, 0)
    monkeypatch.setattr(apart, "share_inside", lambda *_: 0.1)
    with pytest.warns(UserWarning, match=r"not seen in a place of its own in any of 4 tries \(seed 3\): sks, zwx"):
        made = apart.compose(pipe, Subjects(prompt=PROMPT, words=WORDS, seed=3), call, words, refine=0)
    assert made.picture.getpixel((0, 0)) == (9, 0, 0)  # of equal ones the first


@pytest.mark.filterwarnings("ignore:patch .* does not say")
def test_a_scheduler_without_noise_levels_is_refused_before_anything_is_drawn() -> None:
    """EDM's, which diffusers lists as one that Stable Diffusion can take."""
    pipe = tiny_pipeline_of("stable-diffusion")
    adapters = [adapter_of(pipe, word, k) for k, word in enumerate(WORDS)]
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    seen = spied(pipe)
    with pytest.raises(UserError, match="an EDMEulerScheduler has no noise levels"):
        draw_apart(pipe, PROMPT, adapters=adapters, **options_for("stable-diffusion"))
    assert not seen and stack_of(pipe).names() == ()
    engine = engine_of("stable-diffusion")
    seen = spied(engine.pipeline)
    with pytest.raises(UserError, match="an EDMEulerScheduler has no noise levels"):
        engine.draw(PROMPT, apart=True, scheduler="EDMEulerScheduler", **sampling_of("stable-diffusion"))
    assert not seen


@pytest.mark.filterwarnings("ignore:patch .* does not say")
def test_what_serves_all_words_is_computed_once(monkeypatch: pytest.MonkeyPatch, held_places: None) -> None:
    """Of one try: the encoded pictures of the base and of all subjects, what the base predicts, and the masks."""
    pipe = tiny_pipeline_of("stable-diffusion")
    adapters = [adapter_of(pipe, word, k) for k, word in enumerate(WORDS)]
    counts = {"encode": 0, "predict": 0, "masks": 0}

    def counted(owner: Any, name: str, key: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            counts[key] += 1
            return inner(*args, **more)

        monkeypatch.setattr(owner, name, call)

    kind = type(objective_of(pipe))
    counted(kind, "encode_pictures", "encode")
    counted(kind, "predict", "predict")
    counted(apart_base, "cells_of", "masks")
    draw_apart(pipe, PROMPT, adapters=adapters, seed=5, refine=0, **options_for("stable-diffusion"))
    noises, words = 2, len(WORDS)
    places, seen = noises * (1 + words), noises * 2 * words
    assert counts == {"encode": 2, "predict": places + seen, "masks": 1}


@pytest.mark.filterwarnings("ignore:patch .* does not say")
@pytest.mark.parametrize("family", ["stable-diffusion", "qwen-image"])
def test_the_engine_draws_less_work_apart(family: str, held_places: None) -> None:
    """Within Adaptive Guidance the denoiser is hidden, and its adapters with it."""
    engine = engine_of(family)
    full = engine.draw(PROMPT, seed=5, apart=True, **sampling_of(family))[0]
    fast = engine.draw(PROMPT, seed=5, apart=True, fast={"threshold": -1.0}, **sampling_of(family))[0]
    assert list(full.getdata()) != list(fast.getdata())


@pytest.mark.filterwarnings("ignore:patch .* does not say")
def test_weights_act_once_in_each_run(held_places: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the negative prompt are the same in all runs; the objective reads prompts without marks."""
    engine = engine_of("stable-diffusion")
    seen: list[float | None] = []
    read: list[str] = []
    scaled = weighting._scaled

    def watched(output: Any, weights_BL: Tensor | None) -> Any:
        seen.append(None if weights_BL is None else round(float(weights_BL.max()), 3))
        return scaled(output, weights_BL)

    monkeypatch.setattr(weighting, "_scaled", watched)
    predictions = Noised.predictions
    monkeypatch.setattr(Noised, "predictions", lambda self, caption: read.append(caption) or predictions(self, caption))
    prompt = PROMPT.replace(WORDS[0], f"({WORDS[0]}:1.5)")
    engine.draw(prompt, negative="(grey:2)", seed=5, apart=True, refine=0, **sampling_of("stable-diffusion"))
    assert sorted(weight for weight in seen if weight) == [1.5] * 3 + [2.0] * 3
    assert read and not any(mark in text for text in read for mark in "(:")
