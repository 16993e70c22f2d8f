"""The table that compares methods of customization: its objects, its score, and one cell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm.evaluation.customize_table import GROUNDS, METHODS, PARENTS, Cell, fidelity_of, joined, rows, table
from mm.world import vocabulary as v
from mm.world.judge import Judge
from mm.world.render import render
from mm.world.scene import Scene, Sprite


def test_objects_are_new_and_none_is_held_out() -> None:
    assert not {p for pair in PARENTS.values() for p in pair} & set(v.HELD_OUT_OBJECTS)
    assert not set(PARENTS) & set(v.ALL_OBJECTS)
    from mm.customization.methods.registry import METHODS as KNOWN

    assert set(METHODS) <= set(KNOWN)


@pytest.mark.parametrize("name", list(PARENTS))
def test_fidelity_is_high_for_true_pictures_and_low_for_others(name: str) -> None:
    judge = Judge.from_pretrained()
    true = torch.stack([joined(name, ground, 7) for ground in GROUNDS])
    other = render([Scene(sprites=(Sprite(object="banana", x=64, y=64, size=60),), background=g) for g in GROUNDS])
    assert fidelity_of(judge, true, name) > 0.7
    assert fidelity_of(judge, other, name) < 0.3


@pytest.mark.slow
def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    found = table(tmp_path, ["lokr"], ["catcar"], steps=1, limit=0)
    again = table(tmp_path, ["lokr"], ["catcar"], steps=1, limit=0)
    cell = found["lokr"]["catcar"]
    assert again == found
    assert cell.bytes > 1000
    assert cell.drift == 0
    better = {"catcar": Cell(fidelity=cell.fidelity + 1, drift=0.0, bytes=1024, seconds=1.0)}
    assert rows(found | {"lora": better})[2].startswith("| lora |")
