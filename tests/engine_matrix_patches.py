"""Cells of docs/matrix.md for what changes a model: erasure, customization, and several subjects in one picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_matrix import NO_TEXT, SIDE, Model, apart, drawn, source_picture
from PIL import Image
from subject_adapters import adapter_of
from subject_pictures import WORDS, subject_folder

import mm
from mm.core.errors import UserError
from mm.customization.objectives.protocol import objective_of
from mm.engine.requests import Edit

TARGET, NAME = "fox", "sks thing"
SHORT: dict[str, Any] = {
    "steps": 2, "batch_size": 1, "size": SIDE, "preview_every": 2, "preserve_batch": 1, "learning_rate": 5e-2,
    "preserved": (), "samples": (), "rank": 4,
}  # fmt: skip
NO_OBJECTIVE = "its training is not in mm yet; adapters of other programs load"


def _erasure(model: Model, engine: Any, name: str) -> Path:
    """The file of an erasure of the target, made on an engine's model."""
    path = model.root / f"{name}.safetensors"
    if not path.exists():
        mm.erase(engine.pipeline, TARGET).save(path)
    return path


def _adapter(model: Model, engine: Any, name: str) -> Path:
    """The file of an adapter, learned on an engine's model."""
    path = model.root / f"{name}.safetensors"
    if path.exists():
        return path
    kind: dict[str, Any] = {"folder": subject_folder(model.root / "pictures")}
    if "edit" in engine.capabilities.tasks and "draw" not in engine.capabilities.tasks:
        kind = {"folder": _pairs(model.root / "pairs"), "kind": "edit"}
    mm.customize(engine.pipeline, name=NAME, **kind, **SHORT).write(path)
    return path


def _pairs(folder: Path) -> Path:
    """Two pictures before and after their channels were turned round."""
    folder.mkdir(exist_ok=True)
    for number in range(2):
        before = source_picture(number)
        before.save(folder / f"{number}_before.png")
        Image.merge("RGB", before.split()[::-1]).save(folder / f"{number}_after.png")
    return folder


def _check_effect(model: Model, engine: Any, prompt: str, *files: Path) -> None:
    """Files change the picture, in any order to the same one, and leave no trace."""
    plain = model.request()
    request = replace(plain, **{"instruction" if isinstance(plain, Edit) else "prompt": prompt})
    before = drawn(engine, request)[0]
    try:
        engine.set_adapters(list(files))
        changed = drawn(engine, request)[0]
        assert apart(before, changed) > 0
        engine.set_adapters(list(files)[::-1])
        assert apart(changed, drawn(engine, request)[0]) <= 1  # sums in another order
    finally:
        engine.set_adapters([])
    assert apart(before, drawn(engine, request)[0]) == 0


def _check_both(model: Model, prompt: str, *files: Path) -> None:
    """`_check_effect` on the 16-bit model and on its 4-bit copy."""
    for engine in (model.engine, model.small_engine):
        _check_effect(model, engine, prompt, *files)


def _untrained(model: Model) -> bool:
    """Whether the family is refused, having no objective and calls that cannot be watched."""
    can = model.engine.capabilities.tasks
    try:
        objective_of(model.engine.pipeline, SIDE, edit="edit" in can and "draw" not in can)
    except UserError:
        return True
    return False


def erase(model: Model) -> str | None:
    """An erasure of the 16-bit model, on it and on its 4-bit copy."""
    _check_both(model, f"a {TARGET}", _erasure(model, model.engine, "erased"))
    return None


def customize(model: Model) -> str | None:
    """An adapter that was learned on the 16-bit model, on it and on its 4-bit copy."""
    if _untrained(model):
        return NO_OBJECTIVE
    _check_both(model, f"a {NAME}", _adapter(model, model.engine, "learned"))
    return None


def both_four_bits(model: Model) -> str | None:
    """An erasure and an adapter that were made on the 4-bit copy, together on it and on the 16-bit model."""
    if _untrained(model):
        return NO_OBJECTIVE
    both = (_erasure(model, model.small_engine, "erased-4"), _adapter(model, model.small_engine, "learned-4"))
    _check_both(model, f"a {NAME} and a {TARGET}", *both)
    return None


def subjects_apart(model: Model) -> str | None:
    """Two subjects in one picture, each by its own adapter, at 16 and 4 bits."""
    if "draw" not in model.engine.capabilities.tasks:
        return NO_TEXT
    if _untrained(model):
        return NO_OBJECTIVE
    files = []
    for k, word in enumerate(WORDS):
        files.append(model.root / f"subject-{k}.safetensors")
        adapter_of(model.engine.pipeline, word, k).save(files[-1])
    plain = model.request(prompt=f"a {WORDS[0]} and a {WORDS[1]} on grass")
    for engine in (model.engine, model.small_engine):
        engine.set_adapters(files)
        try:
            assert apart(drawn(engine, plain)[0], drawn(engine, replace(plain, apart=True))[0]) > 0
        finally:
            engine.set_adapters([])
    return None


CELLS = {
    "erase": erase,
    "customize": customize,
    "erase + customize, 4 bits": both_four_bits,
    "--apart": subjects_apart,
}
