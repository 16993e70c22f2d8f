"""The record of training: written from logs, and what other runs have left in it stays."""

from __future__ import annotations

import json
from pathlib import Path

from mm.training.journal import journal, read_log, sections, thinned


def log(state: Path, stage: str, first: int, **more: float) -> None:
    rows = [{"step": first + 50 * i, "seconds": 10 * i, "flow": 0.5 - 0.01 * i} for i in range(40)]
    rows.append({"step": first + 2000, "seconds": 400, "compose": 0.75} | more)
    (state / stage).mkdir(parents=True, exist_ok=True)
    text = "\n".join(["a warning", *map(json.dumps, rows)])
    (state / stage / "log.jsonl").write_text(text)


def test_a_curve_is_a_dozen_rows_with_the_last(tmp_path):
    log(tmp_path, "joint", 50)
    rows = read_log(tmp_path / "joint" / "log.jsonl")
    assert len(rows) == 41  # the warning is passed over
    assert 12 <= len(thinned(rows)) <= 22
    assert thinned(rows)[-1] == rows[-1]
    assert read_log(tmp_path / "nowhere.txt") == []


def test_a_later_run_keeps_the_record_of_earlier_ones(tmp_path):
    log(tmp_path / "a", "drawing", 50)
    log(tmp_path / "a", "joint", 50)
    first = journal(tmp_path / "a")
    assert list(sections(first)) == ["Drawing", "Joint"]
    log(tmp_path / "b", "joint", 100)
    second = journal(tmp_path / "b", first)
    assert list(sections(second)) == ["Drawing", "Joint", "Joint, run 2"]
    assert sections(second)["Drawing"] == sections(first)["Drawing"]
    assert sections(second)["Joint"] == sections(first)["Joint"]
    log(tmp_path / "b", "joint", 100, compose_codes=0.5)  # the same run, further on
    third = journal(tmp_path / "b", second)
    assert list(sections(third)) == list(sections(second))
    assert "compose_codes" in sections(third)["Joint, run 2"]
    assert "compose_codes" not in sections(third)["Joint"]


def test_the_published_record_survives_a_new_run(tmp_path):
    published = Path("weights/mm-tiny/training.md").read_text()
    log(tmp_path, "joint", 50)
    after = sections(journal(tmp_path, published))
    for title, text in sections(published).items():
        assert after[title] == text
