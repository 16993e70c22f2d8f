"""Adapters of one name from several files: all of them act, and one file given twice is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline

import mm
from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.engine.attaching import attach_all, detach, parsed

pytestmark = pytest.mark.filterwarnings("ignore:patch .* does not say")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(codes=False)


def written(pipe: Any, folder: Path, kind: str, seed: int) -> Path:
    torch.manual_seed(seed)
    path, layer = next((p, m) for p, m in pipe.trunk.named_modules() if isinstance(m, torch.nn.Linear))
    tensors = {"down": torch.randn(2, layer.in_features), "up": torch.randn(layer.out_features, 2)}
    patch = Patch(entries={f"trunk.{path}": Entry(kind="lowrank", tensors=tensors)}, name="x")
    folder.mkdir()
    file = folder / "x.safetensors"
    patch.save(file) if kind == "mm" else mm.write_lora(patch, file)
    return file


@pytest.mark.parametrize("kinds", [("mm", "mm"), ("lora", "lora"), ("mm", "lora"), ("lora", "mm")])
def test_two_files_of_one_name_both_act(pipe: Any, kinds: tuple[str, str], tmp_path: Path) -> None:
    first = written(pipe, tmp_path / "a", kinds[0], 1)
    second = written(pipe, tmp_path / "b", kinds[1], 2)
    plain = {name: value.clone() for name, value in pipe.trunk.state_dict().items()}
    names, lines = attach_all(pipe, [first, (second, 0.5)])
    assert names == ["x", "x-2"] and stack_of(pipe).names() == ("x", "x-2")
    assert [item.scale for item in stack_of(pipe).list()] == [1.0, 0.5]
    assert len(lines) == 2
    detach(pipe, names)
    assert all(torch.equal(value, plain[name]) for name, value in pipe.trunk.state_dict().items())


def test_one_file_twice_is_refused(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(pipe, tmp_path / "a", "mm", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"x\.safetensors is given twice; give it once, with a scale"):
        attach_all(pipe, [file, ("a/x.safetensors", 0.5)])
    assert not stack_of(pipe).names()


def test_a_folder_of_diffusers_is_an_adapter(pipe: Any, tmp_path: Path) -> None:
    """`save_lora_weights` writes a folder; its name is the adapter's, and the file in it is the same adapter."""
    file = written(pipe, tmp_path / "night", "lora", 1)
    saved = file.rename(file.with_name("pytorch_lora_weights.safetensors"))
    names, lines = attach_all(pipe, [(saved.parent, 0.5)])
    detach(pipe, names)
    assert (names, lines) == (["night"], ["night/pytorch_lora_weights.safetensors: 1 of 1 layer, scale 0.5"])
    with pytest.raises(UserError, match="given twice"):
        attach_all(pipe, [saved.parent, saved])
    assert parsed(f"{saved.parent}:0.5") == (saved.parent, 0.5)
    with pytest.raises(UserError, match="the scale of night is 'x'"):
        parsed(f"{saved.parent}:x")


def test_an_error_names_the_file(pipe: Any, tmp_path: Path) -> None:
    """One of several files, and the user must know which."""
    good, bad = (written(pipe, tmp_path / name, "mm", 1) for name in ("good", "bad"))
    patch = Patch.load(bad)
    patch.entries = {"trunk.nowhere": next(iter(patch.entries.values()))}
    patch.save(bad)
    with pytest.raises(UserError, match=r"bad/x\.safetensors: 0 of 1 layer"):
        attach_all(pipe, [good, bad])
    assert not stack_of(pipe).names()
