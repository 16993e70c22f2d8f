"""Damaged inputs for every reader: a sample in each run, ten thousand a reader with `-m slow` (tests/fuzzing.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import READERS, in_process, main

SAMPLE = {"patch": 200, "lora": 200, "nunchaku": 120, "folder": 60, "png": 200}


@pytest.mark.parametrize("reader", READERS)
def test_a_sample_of_damaged_inputs(reader: str) -> None:
    found = in_process(reader, seed=1, start=0, count=SAMPLE[reader])
    assert not found.faults, found.faults
    assert found.cases == SAMPLE[reader] and found.refused > found.cases // 2


@pytest.mark.slow
def test_ten_thousand_damaged_inputs_a_reader(tmp_path: Path) -> None:
    assert main(["--count", "10000", "--json", str(tmp_path / "fuzz.json")]) == 0
