"""The table that compares methods of customization: its objects, its score, and one cell."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mm.evaluation.customize_table import (
    COMPANIONS,
    GROUNDS,
    METHODS,
    PARENTS,
    Cell,
    Plan,
    beside_prompts,
    fidelity_of,
    joined,
    rows,
    table,
)
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
    # The most similar of several centres counts: where another object is the surer one, it is found all the same.
    assert fidelity_of(judge, true, name, 3) >= fidelity_of(judge, true, name)


def test_prompts_ask_for_every_companion_twice() -> None:
    asked = beside_prompts("catcar")
    assert all("<catcar>" in text for text in asked)
    for number, other in enumerate(COMPANIONS * 2):
        assert other in asked[number]


@pytest.mark.slow
def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    plan = Plan(work=tmp_path, steps=1, limit=0)
    found, failures = table(plan, ["lokr"], ["catcar"])
    again, _ = table(plan, ["lokr"], ["catcar"])
    assert not failures
    cell = found["lokr"]["catcar"]
    assert again == found
    assert cell.bytes > 1000
    assert cell.drift == 0
    assert table(Plan(work=tmp_path, steps=1, limit=0, until=1.0), ["lora", "lokr"], ["catcar"]) == (found, [])


def test_a_cell_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low = Cell(fidelity=0.5, beside=0.5, companion=1.0, drift=0.0, bytes=1024, seconds=1.0)

    def measured(pipe: object, judge: object, method: str, *_: object, **__: object) -> Cell:
        if method == "lora":
            raise ValueError("no such thing")
        return low

    monkeypatch.setattr("mm.evaluation.customize_table.measure", measured)
    monkeypatch.setattr(
        "mm.load", lambda name: SimpleNamespace(pipeline=SimpleNamespace(set_progress_bar_config=lambda disable: None))
    )
    found, failures = table(Plan(work=tmp_path), ["lora", "lokr"], ["catcar"])
    assert found == {"lokr": {"catcar": low}}
    assert failures == ["lora catcar: ValueError: no such thing"]


def test_the_table_begins_with_the_best() -> None:
    low = Cell(fidelity=0.5, beside=0.5, companion=1.0, drift=0.0, bytes=1024, seconds=1.0)
    best = Cell(fidelity=0.9, beside=0.7, companion=1.0, drift=0.1, bytes=1024, seconds=1.0)
    lines = rows({"lokr": {"catcar": low, "starfrog": low}, "lora": {"catcar": best}})
    assert lines[2].startswith("| lora | 0.900 | 0.700 |") and lines[2].endswith("| 1 |")
    assert lines[3].startswith("| lokr | 0.500 |") and lines[3].endswith("| 2 |")
