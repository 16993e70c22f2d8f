"""Job files: strict rows, values that are the model's own, seeds that belong to pictures."""

from __future__ import annotations

import json

import pytest
from batch_rows import row, write

from mm.batch import read_jobs
from mm.batch.jobs import BadRow, Generate, Row
from mm.batch.plan import Plan, picture_seed


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON at column"),
        ("[1]", "a row is an object"),
        ('{"custom_id": "a", "custom_id": "b"}', '"custom_id" twice'),
        (row() | {"task": "fetch"}, 'task is "fetch"'),
        (row() | {"url": "http://x"}, 'unknown field "url"'),
        (row(prompts="x"), 'unknown field "prompts"'),
        (row(prompt=" "), "say in words"),
        (row(prompt="a\ud800"), "do not print"),
        (row(n=0), "n is 0"),
        (row(n=True), "n is true"),
        (row(seed=-1), "seed is -1"),
        (row(mode=7), "mode is 7"),
        (row(size="big"), 'size is "big"'),
        (row(size=[64]), "size is [64]"),
        (row(size=[64, -1]), "height is -1"),
        (row(lora=7), "lora is 7"),
        (row(mask="m.png"), "mask is given without image"),
        (row(strength=0.5), "strength is given without image"),
        (row(negative=[]), "negative is []"),
        (row(guidance="4"), 'guidance is "4"'),
        ('{"custom_id": "a", "task": "generate", "body": {"prompt": "x", "guidance": NaN}}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ('{"custom_id": ' + "9" * 5000 + "}", "cannot be read"),
        *[(row(name), "custom_id is") for name in ("../x", "/etc/x", "a/b", "a\\b", "", ".hidden", "a" * 101, 7, None)],
    ],
)
def test_a_bad_row_is_told_and_stops_no_other(tmp_path, line, says):
    bad, good = read_jobs(write(tmp_path / "jobs.jsonl", line, row("good")))
    assert isinstance(bad, BadRow)
    assert "line 1: " in bad.error and says in bad.error and bad.error.isascii() and len(bad.error) < 400
    assert isinstance(good, Row) and good.line == 2


def test_ids_are_unique_and_lines_bounded(tmp_path):
    long = json.dumps(row(prompt="cat " * 400_000))
    first, second, third, fourth = read_jobs(write(tmp_path / "j", row(), "", row(), long, row("b")))
    assert isinstance(first, Row) and "line 1's" in second.error
    assert "longer than" in third.error and fourth.line == 5


def test_defaults_are_the_models(tmp_path):
    """A row without steps, mode and guidance is drawn, and recorded, with those of the model."""
    plain = write(tmp_path / "j", {"custom_id": "a", "task": "generate", "body": {"prompt": "a cat"}})
    (one,) = Plan(model="mm-tiny", seed=0, root=tmp_path).pictures(next(read_jobs(plain)))
    assert {k: one.picture.settings[k] for k in ("steps", "mode", "guidance")} == {
        "steps": 12,
        "mode": "flow",
        "guidance": 5.5,
    }
    assert all(getattr(Generate(prompt="a cat"), name) is None for name in ("steps", "mode", "guidance", "size"))


SEEDS = [3079850682, 441089729]


def test_seeds_are_frozen(tmp_path):
    """A change here redraws everybody's runs: it is a line in CHANGELOG.md."""
    plain, seeded = read_jobs(write(tmp_path / "j", row("a", n=2), row("b", seed=7)))
    assert [picture_seed(plain, k, 0) for k in range(2)] == SEEDS
    assert picture_seed(seeded, 3, 99) == 10
