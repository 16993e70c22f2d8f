"""Wordings of questions: the files, and what perfect, silent and confused readers score."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from asked_scenes import Oracle

from mm.core.errors import UserError
from mm.evaluation import wide
from mm.evaluation.understand import UnderstandConfig, held_out_scenes

CONFIG = UnderstandConfig(seed=3, limit=60, tuning=True)


def test_held_out_wordings_are_many_and_none_is_for_tuning() -> None:
    report, tune = wide.load_wordings(), wide.load_wordings(wide.TUNING_WORDINGS)
    assert len(report) >= 150
    assert len({w.say.lower().strip("?. ") for w in report} & {w.say.lower().strip("?. ") for w in tune}) == 0
    kinds = Counter(w.kind for w in report)
    assert set(kinds) == set(wide.SAMPLERS) == {w.kind for w in tune}
    assert min(kinds.values()) >= 1 and kinds["count"] >= 10
    for wording in report:
        assert json.loads(wide.to_line(wording)) == {"kind": wording.kind, "say": wording.say} | wording.fixed


def test_a_model_without_faults_answers_every_tuning_wording(tmp_path: Path) -> None:
    oracle = Oracle(held_out_scenes(CONFIG))
    report = wide.evaluate_wide(oracle, CONFIG, each=3, json_file=tmp_path / "r.json")
    assert report["wrong"] == []
    assert report["overall"] == 1.0
    assert report["n"] == report["all questions"]["n"] >= 3 * 150
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["wordings"] == "wordings-tune.jsonl"
    yes = Counter(said for _, said, _ in questions_of(oracle) if said in ("yes", "no"))
    assert 0.3 < yes["yes"] / sum(yes.values()) < 0.7, "always answering yes must not pay"


def questions_of(oracle: Oracle) -> list[tuple[str, str, bool]]:
    scenes = held_out_scenes(CONFIG)
    asked = wide.wide_questions(scenes, wide.load_wordings(wide.TUNING_WORDINGS), 3, 3)
    pictures = wide.to_pictures(scenes)
    said = oracle.answer([pictures[q.scene] for q in asked], [q.text for q in asked])
    return [(q.text, answer, q.right(answer)) for q, answer in zip(asked, said, strict=True)]


@pytest.mark.parametrize("said", ["yes", "no", "", "two", "I do not know what this is."])
def test_a_reader_that_says_one_thing_is_mostly_wrong(said: str) -> None:
    class Same:
        def answer(self, pictures, questions):
            return [said] * len(questions)

        describe = answer

    report = wide.evaluate_wide(Same(), CONFIG, each=2)
    assert report["overall"] < 0.35
    if said.startswith("I do not"):
        assert {k for k, t in report["tasks"].items() if t["score"] == 1.0} == {"outside"}


@pytest.mark.parametrize("line", ['{"kind": "smell", "say": "x"}', '{"kind": "count"}', "no"])
def test_a_bad_wording_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "w.jsonl").write_text('{"kind": "style", "say": "style?"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"w\.jsonl, line 2"):
        wide.load_wordings(tmp_path / "w.jsonl")
