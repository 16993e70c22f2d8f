"""Prompts in other words: the file, how they are read, and the report beside their plain twins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_pipeline

from mm.core.errors import UserError
from mm.evaluation.compose import ComposeConfig
from mm.evaluation.prompts import COMPOSE, load_prompts
from mm.evaluation.wording import (
    OTHER_WORDS,
    OTHER_WORDS_TUNE,
    evaluate_wording,
    plain_twins,
    reading_shares,
    understood_of,
)
from mm.world.judge import Judge
from mm.world.tasks import TASKS


def test_the_held_out_prompts_say_what_their_twins_say_and_none_was_tuned_on() -> None:
    prompts, tuned = load_prompts(OTHER_WORDS), load_prompts(OTHER_WORDS_TUNE)
    assert len(prompts) == 200 and {p.wanted.task for p in prompts} == set(TASKS)
    assert [p.wanted for p in plain_twins(prompts)] == [p.wanted for p in prompts]
    plain = {p.text for p in load_prompts(COMPOSE)}
    assert len(plain & {p.text for p in prompts}) <= 5  # "4 owls" is what a stranger writes as well
    assert not {p.text.lower() for p in tuned} & {p.text.lower() for p in prompts}


def test_most_prompts_are_read() -> None:
    """The shares that docs/evaluation.md reports; the lexicon of before read 172, and 133 in silence."""
    shares = reading_shares(load_prompts(OTHER_WORDS))["all"]
    assert shares["n"] == 200 and shares["read"] >= 190 and shares["silent"] >= 170
    tuned = reading_shares(load_prompts(OTHER_WORDS_TUNE))["all"]
    assert tuned["read"] >= 0.98 * tuned["n"] and tuned["silent"] >= 0.9 * tuned["n"]


def test_a_meaning_that_does_not_arrive_is_not_counted() -> None:
    by_id = {p.id: p for p in load_prompts(OTHER_WORDS)}
    from dataclasses import replace

    prompt = by_id["counting-006"]  # four donuts
    for text, read, silent in (
        ("a quartet of doughnuts", True, True),
        ("4 yummy donuts", True, False),
        ("donuts", False, False),
        ("four donuts at night", False, False),
        ("four pizzas", False, False),
    ):
        found = understood_of(replace(prompt, text=text))
        assert (found.read, found.silent) == (read, silent), text


def test_the_report_has_both_wordings(tmp_path: Path) -> None:
    config = ComposeConfig(limit=1, pictures=1, steps=1)
    report = evaluate_wording(
        tiny_pipeline(), Judge.from_pretrained(), config, json_file=tmp_path / "a.json", settings={"model": "tiny"}
    )
    assert report == json.loads((tmp_path / "a.json").read_text()) and (tmp_path / "a.png").exists()
    assert {"overall", "ceiling", "n", "tasks", "settings", "plain", "change", "reading"} <= report.keys()
    assert report["n"] == report["plain"]["n"] == report["reading"]["all"]["n"] == len(TASKS)
    assert report["settings"]["model"] == "tiny" and report["settings"]["prompts"] == str(OTHER_WORDS)


def test_a_prompt_without_its_twin_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "mine", "task": "counting", "prompt": "2 cats", "groups": [["cat", None, 2]]}))
    with pytest.raises(UserError, match=r"'mine'.*does not ask for what the prompt of that id"):
        plain_twins(load_prompts(file))
