"""Two adapters of a tiny Stable Diffusion, for tests that merge."""

from __future__ import annotations

from typing import Any

import pytest
from subject_pictures import WORDS, subject_folder
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.adapters.patch import Patch
from mm.customization.customize import customize

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
