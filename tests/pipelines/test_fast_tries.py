"""`fast` in codes mode: cheap tries that the model reads; what is drawn again, and what is not checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tiny import seeded, tiny_pipeline

from mm.adapters import Patch
from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.pipelines.best_of import CheckedOutput, seed_of_try
from mm.pipelines.fast import CAREFUL_CODES, FULL_CODES, FastCodes, fast_settings, settings_for
from mm.pipelines.self_reader import Shortfall
from mm.world.asked import Asked

UNREAD = "a cat in a house"
SHORT: dict[str, Any] = {"steps": 4, "unchecked_steps": 5}
OPTIONS: dict[str, Any] = {"mode": "codes", "output_type": "latent", "strict": False}


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline that finds every picture of a dog wrong, and all others right; `pipe.checked` has what was asked."""
    made: Any = tiny_pipeline()
    made.set_progress_bar_config(disable=True)
    made.checked = []

    def checker(asked: Sequence[Asked | None]) -> Any:
        def check(rows: Sequence[int], _: torch.Tensor) -> list[Shortfall | None]:
            made.checked.append(list(rows))
            return [_found(asked[i]) for i in rows]

        return check

    monkeypatch.setattr(made, "_checker", checker)
    monkeypatch.setattr(made, "_can_read", lambda: True)
    return made


def _found(asked: Asked | None) -> Shortfall | None:
    if asked is None:
        return None
    return Shortfall(wrong=1, missing=("a dog",)) if "dog" in asked.said else Shortfall()


def once(pipe: Any, prompt: str, seed: int, settings: FastCodes) -> torch.Tensor:
    return pipe(prompt, generator=seeded(seed), fast=asdict(settings), **OPTIONS).images


def test_what_is_wrong_is_drawn_again_and_what_is_unread_once_with_care(pipe: Any):
    mix = settings_for("codes", SHORT | {"tries": 3})
    made = pipe(["a cat", "a dog", UNREAD], generator=seeded(1, 2, 3), fast=SHORT | {"tries": 3}, **OPTIONS)
    assert isinstance(made, CheckedOutput) and isinstance(mix, FastCodes)
    assert (made.tries, made.right, made.missing) == ([1, 3, 1], [True, False, None], [[], ["a dog"], []])
    assert made.steps == [4, 4, 5]
    unread = pipe(UNREAD, generator=seeded(3), fast=SHORT, **OPTIONS)
    assert isinstance(unread, CheckedOutput)
    assert (unread.tries, unread.right, unread.missing, unread.steps) == ([1], [None], [[]], [5])
    assert pipe(UNREAD, generator=seeded(3), fast=SHORT, num_inference_steps=6, **OPTIONS).steps == [6]
    assert pipe.checked == [[0, 1, 2], [1], [1]]
    cheap, careful = mix.of_one(checked=True), mix.of_one(checked=False)
    assert careful == FastCodes(**(asdict(CAREFUL_CODES) | {"steps": 5})) and cheap.tries == careful.tries == 1
    alone = [once(pipe, "a cat", 1, cheap), once(pipe, "a dog", 2, cheap), once(pipe, UNREAD, 3, careful)]
    torch.testing.assert_close(made.images, torch.cat(alone))
    right = iter([[Shortfall(wrong=1)], [Shortfall()]])
    pipe._checker = lambda asked: lambda rows, latents: next(right)
    second = pipe("a dog", generator=seeded(2), fast=SHORT, **OPTIONS)
    assert second.tries == [2]
    torch.testing.assert_close(second.images, once(pipe, "a dog", seed_of_try(2, 1), cheap))


def test_a_picture_does_not_depend_on_its_batch(pipe: Any):
    prompts = ["a dog", "a cat", UNREAD, "a dog"]
    together = pipe(prompts, generator=seeded(4, 5, 6, 7), fast=SHORT, **OPTIONS)
    for k, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeded(4 + k), fast=SHORT, **OPTIONS)
        torch.testing.assert_close(alone.images, together.images[k : k + 1])
        assert getattr(alone, "tries", [1]) == together.tries[k : k + 1]


def test_best_of_says_how_often_in_place_of_the_mix(pipe: Any):
    assert pipe("a dog", generator=seeded(1), fast=SHORT, best_of=2, **OPTIONS).tries == [2]
    assert pipe("a dog", generator=seeded(1), fast=SHORT | {"tries": 1}, best_of=2, **OPTIONS).tries == [2]
    plain = asdict(FULL_CODES) | {"steps": 4}
    assert not hasattr(pipe("a dog", generator=seeded(1), fast=plain, **OPTIONS), "tries")


def test_the_steps_of_a_call_count_for_each_try(pipe: Any):
    steps: list[int] = []

    def note(run: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {}

    given = OPTIONS | {"callback_on_step_end": note, "generator": seeded(1)}
    for prompt, own, wanted in (
        ("a cat", None, 4), ("a cat", 4, 4), ("a cat", 6, 6), (UNREAD, None, 5), (UNREAD, 4, 5), (UNREAD, 6, 6),
    ):  # fmt: skip
        steps.clear()
        pipe(prompt, fast=SHORT | {"tries": 2}, num_inference_steps=own, **given)
        assert max(steps) < wanted <= max(steps) + 2, (prompt, own)  # sure tokens save a step of a careful picture


def test_nothing_is_read_where_it_cannot_be(pipe: Any, monkeypatch: pytest.MonkeyPatch):
    """Encoded prompts, one try, prompts that are not read in full, and models without the parts that read."""
    mix = settings_for("codes", SHORT)
    assert isinstance(mix, FastCodes)
    careful = once(pipe, "a dog", 1, mix.of_one(checked=False))
    given = {"generator": seeded(1), **OPTIONS}
    encoded = pipe(prompt_embeds=pipe.encode_prompt("a dog")[0], fast=SHORT, **given)
    torch.testing.assert_close(encoded.images, careful)
    pipe("a dog", fast=SHORT | {"tries": 1}, **given), pipe(UNREAD, fast=SHORT, **given)
    monkeypatch.setattr(pipe, "_can_read", lambda: False)
    torch.testing.assert_close(pipe("a dog", fast=SHORT, **given).images, careful)
    assert not pipe.checked
    pipe("two dogs", fast=True, mode="flow", generator=seeded(1), num_inference_steps=1)
    assert not pipe.checked


def test_a_model_is_asked_for_its_reading_parts_once(tmp_path: Any):
    pipe = tiny_pipeline()
    assert not pipe._can_read()
    pipe.save_pretrained(tmp_path)
    assert not type(pipe).from_pretrained(tmp_path)._can_read()
    assert type(pipe).from_pretrained("mm-tiny")._can_read()


def test_settings_of_older_files_draw_once():
    """A file of before there were tries names all other settings; a part of them is what someone asks for now."""
    older = asdict(FULL_CODES) | {"steps": 26, "confidence": -0.4, "neighbours": True}
    for name in ("power", "spread", "tries", "unchecked_steps"):
        del older[name]
    drawn = settings_for("codes", older)
    assert drawn == FastCodes(**older, tries=1, power=None, spread=False) == CAREFUL_CODES
    assert fast_settings("codes", {"steps": 26})["tries"] == FastCodes().tries > 1


@pytest.mark.parametrize(
    "given, said",
    [
        ({"tries": 0}, "tries is 0"), ({"tries": 65}, "tries is 65"), ({"tries": 2.5}, "tries is 2.5"),
        ({"unchecked_steps": 0}, "unchecked_steps is 0"), ({"spread": 1}, "spread is 1"),
        ({"power": 0.5}, "power is 0.5"), ({"power": "high"}, "power is 'high'"),
        ({"try": 2}, "no setting 'try'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_drawn(pipe: Any, given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        pipe("a dog", fast=given, **OPTIONS)
    with pytest.raises(UserError, match="no setting 'tries'"):
        pipe("a dog", fast={"tries": 2})


@pytest.mark.parametrize("baked", [False, True])
def test_a_prompt_for_what_was_erased_is_not_checked(pipe: Any, baked: bool):
    """The try in which an erased thing is seen best would be kept: with `fast` and with `best_of` it is drawn once."""
    layer = pipe.trunk.text_layers[0].to_k_pic
    tensors = {"down": torch.zeros(2, layer.in_features), "up": torch.zeros(layer.out_features, 2)}
    entries = {"trunk.text_layers.0.to_k_pic": Entry(kind="lowrank", tensors=tensors)}
    patch = Patch(entries=entries, name="no-dog", method="uce", report={"targets": ["dog", "red of cat"]})
    with pytest.warns(UserWarning, match="does not say which model"):
        patch.bake(pipe) if baked else patch.apply(pipe)
    prompts = ["a cat", "two dogs", "a puppy", "a red cat", "a blue cat"]
    for options in ({"fast": SHORT}, {"best_of": 2, "num_inference_steps": 2}):
        made = pipe(prompts, generator=seeded(1, 2, 3, 4, 5), **options, **OPTIONS)
        assert (made.tries, made.right) == ([1] * 5, [True, None, None, None, True])
