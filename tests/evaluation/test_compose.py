"""The compose evaluation: intervals, ceilings, seeds, files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from mm.core.errors import UserError
from mm.core.statistics import share, wilson
from mm.evaluation import compose, prompt_sets
from mm.evaluation.compose import ComposeConfig, evaluate_compose, limited, picture_seed, score, true_scene
from mm.evaluation.prompts import COMPOSE, COMPOSE_TUNE, from_line, load_prompts, to_line
from mm.world.judge import Found, Judge, Reading
from mm.world.scene import is_held_out
from mm.world.tasks import TASKS, satisfies


class Oracle:
    """Reads nothing: answers with the labels of its scenes."""

    def __init__(self, scenes: list) -> None:
        self.scenes = scenes

    def read(self, pictures: torch.Tensor) -> list[Reading]:
        return [
            Reading(
                readable=True,
                background=s.background,
                style=s.style,
                objects=tuple(
                    Found(
                        object=p.object, colour=p.colour, x=p.x, y=p.y, size=p.size, confidence=1.0, colours=(p.colour,)
                    )
                    for p in s.sprites
                ),
            )
            for s in self.scenes[: len(pictures)]
        ]


def test_wilson_solves_its_equation() -> None:
    for hits, n in ((0, 10), (3, 10), (10, 10), (450, 500)):
        for bound in wilson(hits, n):
            if 1e-9 < bound < 1 - 1e-9:  # the bounds are where |share - p| = z sqrt(p (1 - p) / n)
                assert math.isclose(abs(hits / n - bound), 1.959964 * math.sqrt(bound * (1 - bound) / n), rel_tol=1e-6)
    assert share([True, False])["score"] == 0.5
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_reporting_prompts_are_held_out_and_the_tuning_ones_are_not() -> None:
    report, tune = load_prompts(COMPOSE), load_prompts(COMPOSE_TUNE)
    assert [sum(p.wanted.task == t for p in report) for t in TASKS] == [80, 99, 80, 94, 100, 100]
    assert all(is_held_out(p.wanted.groups) for p in report if p.wanted.task != "single object")
    assert not any(is_held_out(p.wanted.groups) for p in tune)
    assert not {p.text for p in report if p.wanted.task != "single object"} & {p.text for p in tune}


def test_prompt_files_are_what_the_generator_writes() -> None:
    for held_out, path in ((True, COMPOSE), (False, COMPOSE_TUNE)):
        assert [to_line(p) for p in prompt_sets.compose_prompts(held_out=held_out)] == path.read_text().splitlines()


def test_true_scenes_satisfy_their_prompts() -> None:
    chosen = limited(load_prompts(COMPOSE), 12)
    scenes = [true_scene(p, 0) for p in chosen]
    readings = Oracle(scenes).read(torch.zeros(len(scenes)))
    assert all(satisfies(r, p.wanted).ok for r, p in zip(readings, chosen, strict=True))


def test_shuffled_scenes_fail() -> None:
    chosen = limited(load_prompts(COMPOSE), 12)
    scenes = [true_scene(p, 0) for p in chosen]
    random.Random(0).shuffle(scenes)
    readings = Oracle(scenes).read(torch.zeros(len(scenes)))
    report = score([satisfies(r, p.wanted) for r, p in zip(readings, chosen, strict=True)], chosen)
    assert report["overall"] < 0.3


def test_seeds_depend_on_run_prompt_and_index_alone() -> None:
    assert picture_seed(0, "a", 0) == picture_seed(0, "a", 0)
    assert len({picture_seed(s, p, i) for s in range(3) for p in "abc" for i in range(4)}) == 36


def test_a_whole_run_with_a_random_model(tmp_path: Path) -> None:
    config = ComposeConfig(limit=1, pictures=2, steps=1, batch_size=5)
    judge = Judge().eval()
    report = evaluate_compose(tiny_pipeline(), judge, config, json_file=tmp_path / "c.json")
    stored = json.loads((tmp_path / "c.json").read_text())
    assert {"overall", "ceiling", "n", "tasks", "settings"} <= set(stored)
    assert stored["n"] == 12
    assert stored["tasks"]["counting"].keys() == {"score", "n", "low", "high"}
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert report["settings"]["steps"] == 1


def test_batching_changes_no_picture() -> None:
    pipe = tiny_pipeline()
    jobs = [(p, picture_seed(0, p.id, 0)) for p in limited(load_prompts(COMPOSE), 1)]
    one, all_ = (compose.draw(pipe, jobs, ComposeConfig(steps=2, batch_size=b), None) for b in (1, 6))
    assert (one.int() - all_.int()).abs().max() <= 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"}', "task, prompt, groups missing"),
        ('{"id": "a", "task": "counting", "prompt": "x", "groups": [["zebra", null, 2]]}', "zebra"),
        ('{"id": "a", "task": "counting", "prompt": "x", "groups": [["cat", null, 9]]}', "9"),
        ('{"id": "a", "task": "colours", "prompt": "x", "groups": [["cat", "red", 1]], "style": "sketch"}', "sketch"),
        ("no json", "no JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_line(line)
    (tmp_path / "p.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        load_prompts(tmp_path / "p.jsonl")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="pictures is 0"):
        ComposeConfig(pictures=0)
