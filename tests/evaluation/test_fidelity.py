"""Sharpness and the Frechet distance against closed forms, and the report of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from mm.evaluation.compose import ComposeConfig
from mm.evaluation.fidelity import evaluate_fidelity, frechet_distance, gradient_energy, judge_features, sharpness
from mm.world.judge import Judge, JudgeConfig


def test_frechet_distance_of_gaussians_on_one_axis() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2 an axis where covariances commute (Dowson and Landau 1982)."""
    torch.manual_seed(0)
    unit = torch.randn(4000, 3).double()
    unit = (unit - unit.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(unit.T))).T
    scales, shift = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([3.0, 0.0, -1.0])
    assert frechet_distance(unit, unit * scales + shift) == pytest.approx(9 + 1 + 1 + 0 + 0.25, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(3, 3).double())[0]
    assert frechet_distance(unit @ turn, (unit * scales + shift) @ turn) == pytest.approx(11.25, abs=1e-6)
    assert frechet_distance(unit, unit) == pytest.approx(0, abs=1e-6)


def test_sharpness_is_the_share_of_the_energy() -> None:
    stripes = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    stripes[..., ::2] = 200
    assert gradient_energy(stripes).tolist() == pytest.approx([(200 / 255) ** 2] * 2)
    half = sharpness(gradient_energy(stripes // 2), gradient_energy(stripes), [0, 1])
    assert (half["score"], half["n"], half["low"], half["high"]) == (0.25, 2, 0.25, 0.25)


def test_the_interval_comes_from_prompts() -> None:
    drawn, true = torch.tensor([1.0, 1.0, 3.0, 3.0]), torch.ones(4)
    apart = sharpness(drawn, true, [0, 0, 1, 1])
    assert apart["score"] == 2.0
    assert (apart["low"], apart["high"]) == (1.0, 3.0)


def test_features_do_not_depend_on_the_batch() -> None:
    judge = Judge(JudgeConfig(stem=8, width=8, deep=8, deep_blocks=1)).eval()
    pictures = torch.randint(256, (3, 3, 128, 128), dtype=torch.uint8)
    together = judge_features(judge, pictures)
    assert together.shape == (3, 8)
    torch.testing.assert_close(together[1:2], judge_features(judge, pictures[1:2]))
    assert not judge.pooled._forward_hooks


def test_report(tmp_path: Path) -> None:
    judge = Judge(JudgeConfig(stem=8, width=8, deep=8, deep_blocks=1)).eval()
    config = ComposeConfig(limit=1, pictures=2, steps=1)
    report = evaluate_fidelity(tiny_pipeline(), judge, config, json_file=tmp_path / "fidelity.json")
    assert report["n"] == 12 == sum(task["n"] for task in report["tasks"].values())
    assert report["low"] <= report["overall"] <= report["high"]
    assert report["frechet"] > report["frechet_floor"] >= 0
    assert json.loads((tmp_path / "fidelity.json").read_text())["settings"]["pictures"] == 2
    assert (tmp_path / "fidelity.png").is_file()
