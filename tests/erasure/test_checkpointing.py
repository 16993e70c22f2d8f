"""Erasure by gradients learns the same where large denoisers compute their blocks again."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline_of

import mm
from mm.layers import checkpointing

SMALL: dict[str, dict[str, Any]] = {
    "robust": {"rounds": 1, "iterations": 2, "picture_steps": 2, "pool": 2}, "esd": {"steps": 2}, "salun": {"steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("method", list(SMALL))
def test_the_patch_is_the_same(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    pipe, again = tiny_pipeline_of("stable-diffusion"), []
    before = checkpointing.Inputs.__call__

    def counted(self: Any, block: Any, *given: Any) -> Any:
        again.append(block)
        return before(self, block, *given)

    monkeypatch.setattr(checkpointing.Inputs, "__call__", counted)
    found = []
    for least in (10**9, 1):
        monkeypatch.setattr(checkpointing, "LARGE", least)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch = mm.erase(pipe, "dog", method=method, seed=0, **SMALL[method])
        assert bool(again) == (least == 1)
        file = tmp_path / f"{least}.safetensors"
        patch.save(file)
        found.append(load_file(file))
    plain, computed = found
    assert plain and set(plain) == set(computed)
    for key, value in plain.items():
        assert torch.allclose(value.float(), computed[key].float(), atol=1e-3 * float(value.abs().max()) + 1e-6), key
