"""Adapters merged by training: they are fitted to the adapters' own predictions, and the model stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from subject_pictures import WORDS
from tiny_pipelines import SIDE, draw_with
from torch import Tensor
from typer.testing import CliRunner

import mm.customization.merging.merge as merge_module
import mm.customization.merging.teachers as teachers_module
from mm.adapters.acting import acting
from mm.adapters.patch import Patch
from mm.cli.merge import app
from mm.core.errors import UserError
from mm.customization.merging.distill import Distillation
from mm.customization.merging.merge import merge
from mm.customization.merging.teachers import Teachers, Together
from mm.customization.objectives.protocol import objective_of
from mm.customization.places import Box

NOISES = 4
UPDATES = 40


@pytest.fixture(scope="module", autouse=True)
def few_targets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers_module, "_NOISES", NOISES)
        patch.setattr(teachers_module, "_TRIES", 1)
        patch.setattr(merge_module, "Distillation", partial(Distillation, pairs=1))
        yield


@pytest.fixture(scope="module")
def merged(pipe: Any, adapters: list[Patch]) -> Patch:
    return merge(adapters, method="distill", pipe=pipe, steps=1, updates=UPDATES, seed=3)


def weights_of(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name in ("unet", "text_encoder") for key, value in getattr(pipe, name).state_dict().items()
    }  # fmt: skip


def test_training_brings_the_merged_layers_nearer_to_the_adapters(merged: Patch) -> None:
    assert merged.report["error"] < 0.95 * merged.report["error_before"]


def test_the_report_holds_the_error_that_an_independent_loop_finds(
    pipe: Any, adapters: list[Patch], merged: Patch
) -> None:
    """The share is computed again here, from predictions with whole patches on."""
    objective = objective_of(pipe)
    teachers = Teachers(objective, adapters, WORDS, (1.0, 1.0), seed=3, steps=1)
    wrong = plain = 0.0
    for targets in teachers.own:
        part = slice(0, len(targets), max(1, len(targets) // 32))
        given = (targets.noisy[part], targets.level_M[part], targets.prompts[part])
        with torch.no_grad():
            base = objective.predict(given[0], given[1], objective.encode_prompts(given[2]))
            merged.apply(pipe)
            total = objective.predict(given[0], given[1], objective.encode_prompts(given[2]))
            merged.undo(pipe)
        plain += float((base - targets.wanted[part]).square().mean())
        wrong += float((total - targets.wanted[part]).square().mean())
    assert (wrong / plain) ** 0.5 == pytest.approx(merged.report["error"], rel=0.02)


def test_the_targets_are_what_each_adapter_predicts(pipe: Any, adapters: list[Patch]) -> None:
    objective = objective_of(pipe)
    teachers = Teachers(objective, adapters, WORDS, (1.0, 0.5), seed=5, steps=1)
    assert {len(targets) for targets in teachers.own} == {8 * NOISES}
    for targets, patch, word, scale in zip(teachers.own, adapters, WORDS, (1.0, 0.5), strict=True):
        assert all(word in prompt or not prompt for prompt in targets.prompts)
        assert "" in targets.prompts
        patch.apply(pipe, scale)
        with torch.no_grad():
            condition = objective.encode_prompts(targets.prompts[:4])
            again = objective.predict(targets.noisy[:4], targets.level_M[:4], condition)
        patch.undo(pipe)
        assert torch.allclose(again, targets.wanted[:4], atol=1e-5)


def test_the_model_is_as_before_and_the_same_seed_gives_the_same_file(
    pipe: Any, adapters: list[Patch], merged: Patch
) -> None:
    before, picture = weights_of(pipe), draw_with("stable-diffusion", pipe)
    one, again = (merge(adapters, method="distill", pipe=pipe, steps=1, updates=2, seed=3) for _ in range(2))
    after = weights_of(pipe)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(picture, draw_with("stable-diffusion", pipe))
    for path, entry in one.entries.items():
        assert all(torch.equal(value, again.entries[path].tensors[key]) for key, value in entry.tensors.items())
    assert merged.method == "merged-distill" and merged.settings["updates"] == UPDATES


def test_pictures_of_two_subjects_name_both(pipe: Any, adapters: list[Patch]) -> None:
    teachers = Teachers(objective_of(pipe), adapters, WORDS, (1.0, 1.0), seed=7, steps=1)
    for pair in teachers.pairs(3):
        assert all(word in pair.caption for word in WORDS)
        assert pair.picture.size == (SIDE, SIDE)
        assert [word in prompt for word, prompt in zip(("sks", "zwx"), pair.prompts, strict=True)] in (
            [True, True], [False, False],
        )  # fmt: skip


def test_targets_of_two_subjects_are_what_each_adapter_predicts_at_its_place(pipe: Any, adapters: list[Patch]) -> None:
    """Predictions with one whole patch on are compared, cell by cell, with the targets."""
    objective = objective_of(pipe)
    teachers = Teachers(objective, adapters, WORDS, (1.0, 1.0), seed=7, steps=1)
    box = [Box(left=0.0, top=0.0, right=0.5, bottom=0.5), Box(left=0.5, top=0.5, right=1.0, bottom=1.0)]
    pair = Together(
        picture=teachers.drawn[0][0].picture, caption="a sks and a zwx", plain="a dog and a car", names=(0, 1),
        prompts=("a sks and a car", "a dog and a zwx"), places=(box[0], box[1]),
    )  # fmt: skip
    made = teachers.of_pairs([pair])
    assert made is not None and made.prompts == (pair.caption,) * NOISES
    cases: list[tuple[Patch | None, str]] = [(None, pair.plain), (adapters[0], pair.prompts[0])]
    cases.append((adapters[1], pair.prompts[1]))
    half = made.wanted.shape[-1] // 2
    places = (
        (slice(0, half), slice(half, None)), (slice(0, half), slice(0, half)), (slice(half, None), slice(half, None)),
    )  # fmt: skip
    for (patch, prompt), (rows, columns) in zip(cases, places, strict=True):
        with torch.no_grad(), acting(pipe, patch):
            given = objective.predict(made.noisy, made.level_M, objective.encode_prompts([prompt] * NOISES))
        assert torch.allclose(given[..., rows, columns], made.wanted[..., rows, columns], atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "distill"}, "give the model"),
        ({"method": "sum", "updates": 5}, "updates is 5, which sum does not use"),
        ({"method": "distill", "updates": 0}, "updates is 0"),
    ],
)
def test_what_does_not_fit_is_refused(adapters: list[Patch], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge(adapters, **given)


@pytest.mark.parametrize(
    "wrong", [{"updates": 0}, {"adapters": 0}, {"pairs": -1}, {"learning_rate": 0.0}, {"clip": -1}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=name):
        Distillation(**wrong)


def test_the_command_refuses_updates_where_nothing_is_trained(adapters: list[Patch], tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for patch, file in zip(adapters, files, strict=True):
        patch.save(file)
    out = tmp_path / "out.safetensors"
    found = CliRunner().invoke(app, [*map(str, files), "-o", str(out), "--updates", "5"])
    assert found.exit_code != 0 and not out.exists()
    assert "updates is 5, which sum does not use" in str(found.exception or found.output)
