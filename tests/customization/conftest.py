"""Two adapters of a tiny Stable Diffusion, for tests that merge, and families without their objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from subject_pictures import WORDS, subject_folder
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.adapters.patch import Patch
from mm.customization.customize import customize
from mm.families import family_of
from mm.families.registry import register

FAST: dict[str, Any] = {
    "steps": 3, "batch_size": 1, "size": SIDE, "preview_every": 3, "learning_rate": 5e-2, "preserved": (), "rank": 4,
    "samples": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline_of("stable-diffusion")


@pytest.fixture(scope="module")
def adapters(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Patch]:
    """Not on the model."""
    folder = subject_folder(tmp_path_factory.mktemp("subject"))
    found: list[Patch] = [
        customize(pipe, folder, name=name, method="dreambooth", seed=k, **FAST) for k, name in enumerate(WORDS)
    ]
    assert all(patch.report["best_step"] == 3 for patch in found)  # else the adapters change nothing
    return found


@pytest.fixture
def without_objective() -> Iterator[Any]:
    """Takes the objective off families by name."""
    before = []

    def take(pipe: Any) -> Any:
        family = family_of(pipe)
        assert family is not None and family.objective
        before.append(family)
        register(dataclasses.replace(family, objective=None), replace=True)
        return pipe

    yield take
    for family in before:
        register(family, replace=True)
