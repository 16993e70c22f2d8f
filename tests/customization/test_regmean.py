"""Adapters merged by least squares: the solution against an independent one, what is kept, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import draw_with
from torch import Tensor, nn
from typer.testing import CliRunner

from mm.adapters.patch import Patch
from mm.cli.merge import app
from mm.core.errors import UserError
from mm.customization.merging.merge import merge
from mm.customization.merging.regmean import Moments, cut_in, mergeable, reading


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(inputs: list[Tensor], path: str = "root.layer") -> Moments:
    made = Moments.__new__(Moments)
    made.paths, made.each = [path], [{path: (x.T @ x / len(x)).double()} for x in inputs]
    return made


def test_the_merged_change_is_the_least_squares_solution() -> None:
    """Against torch.linalg.lstsq on the stacked rows, each set divided by the root of its number of rows."""
    inputs = [normal(40, 12, seed=k) for k in range(3)]
    deltas = [normal(7, 12, seed=10 + k) for k in range(2)]
    found = moments_of(inputs).merged("root.layer", deltas, None)
    rows = [(2 * 0.5) ** 0.5 * inputs[0] / 40**0.5, inputs[1] / 40**0.5, inputs[2] / 40**0.5]
    wanted = [torch.zeros(40, 7), rows[1] @ deltas[0].T, rows[2] @ deltas[1].T]
    metric = sum(x.double().T @ x.double() for x in rows)
    ridge = (1e-3 * metric.diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    stacked = torch.cat([*(x.double() for x in rows), ridge])
    solution = torch.linalg.lstsq(
        stacked, torch.cat([*(x.double() for x in wanted), torch.zeros(12, 7).double()])
    ).solution
    assert torch.allclose((found.up @ found.down).double(), solution.T, atol=1e-5)
    assert found.lost < 1e-6 and 0 < found.error < 1.5


def test_adapters_that_read_apart_are_merged_without_error() -> None:
    first, second = torch.zeros(30, 12), torch.zeros(30, 12)
    first[:, :4], second[:, 4:8] = normal(30, 4, seed=1), normal(30, 4, seed=2)
    deltas = [normal(5, 12, seed=3), normal(5, 12, seed=4)]
    found = moments_of([torch.zeros(30, 12), first, second]).merged("root.layer", deltas, None)
    both = found.up @ found.down
    assert torch.allclose(first @ both.T, first @ deltas[0].T, atol=2e-2)
    assert torch.allclose(second @ both.T, second @ deltas[1].T, atol=2e-2)
    assert found.error < 0.01


def test_a_cut_is_the_best_for_the_inputs_that_were_seen() -> None:
    delta, x = normal(9, 12, seed=5), normal(50, 12, seed=6) * torch.linspace(0.05, 3, 12)
    metric = (x.T @ x).double()
    down, up, lost = cut_in(delta.double(), metric, 3)
    error = float((x @ (delta - up @ down).T).norm() / (x @ delta.T).norm())
    left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    plain = left[:, :3] * sizes[:3] @ right[:3]
    assert error == pytest.approx(lost, rel=1e-4)
    assert error < 0.9 * float((x @ (delta - plain).T).norm() / (x @ delta.T).norm())


def test_what_layers_read_is_summed_and_the_hooks_are_taken_off() -> None:
    layer = nn.Linear(6, 4)
    root = nn.Sequential(layer)
    target = type("Target", (), {"components": {"unet": root}})()
    x = normal(2, 5, 6, seed=7)
    with reading(target, ["unet.0"]) as seen:
        layer(x)
        layer(x[:1])
    sums, count = seen["unet.0"]
    rows = torch.cat([x.flatten(0, 1), x[0]])
    assert count == 15 and torch.allclose(sums.float(), rows.T @ rows, atol=1e-4)
    assert not layer._forward_pre_hooks


def test_a_merge_does_on_each_word_what_its_adapter_does(pipe: Any, adapters: list[Patch]) -> None:
    """Nearer to each adapter's own picture than the plain sum; the model is as it was."""
    before = draw_with("stable-diffusion", pipe, prompt="a sks")
    moved = {}
    for method in ("sum", "regmean"):
        total = merge(adapters, method=method, **({"pipe": pipe, "steps": 2} if method == "regmean" else {}))
        moved[method] = 0.0
        for patch, word in zip(adapters, ("sks", "zwx"), strict=True):
            pictures = []
            for one in (patch, total):
                one.apply(pipe)
                pictures.append(draw_with("stable-diffusion", pipe, prompt=f"a {word}"))
                one.undo(pipe)
            moved[method] += float((pictures[0] - pictures[1]).norm())
    assert moved["regmean"] < 0.8 * moved["sum"]
    assert total.report["mean_error"] < 1 and total.method == "merged-regmean"
    assert all(len(e.tensors["down"]) <= 8 for e in total.entries.values() if mergeable(e))
    assert torch.equal(before, draw_with("stable-diffusion", pipe, prompt="a sks"))


def test_an_adapter_that_is_on_the_model_is_refused_before_anything_is_drawn(pipe: Any, adapters: list[Patch]) -> None:
    """What the model does without it is measured, too."""
    adapters[1].apply(pipe)
    try:
        for method in ("regmean", "distill"):
            with pytest.raises(UserError, match=r"the patch 'zwx' is on the model; take it off first"):
                merge(adapters, method=method, pipe=pipe, progress=lambda share, text: pytest.fail("it draws"))
    finally:
        adapters[1].undo(pipe)


def test_an_adapter_that_changes_nothing_is_named(pipe: Any, adapters: list[Patch]) -> None:
    """Two of them hold the same zeros, and were called the same adapter."""
    nothing = [
        replace(patch, entries={
            path: replace(entry, tensors=entry.tensors | {"up": torch.zeros_like(entry.tensors["up"])})
            for path, entry in patch.entries.items()
        })
        for patch in adapters
    ]  # fmt: skip
    for given in (nothing, [adapters[0], nothing[0]]):
        with pytest.raises(UserError, match=r"'sks' changes nothing, perhaps since its training learned nothing"):
            merge(given)


def test_what_regmean_needs_is_said_before_anything_is_drawn(pipe: Any, adapters: list[Patch], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"regmean draws with each adapter; give the model"):
        merge(adapters, method="regmean")
    with pytest.raises(UserError, match=r"1 word for 2 adapters"):
        merge(adapters, method="regmean", pipe=pipe, words=["sks"])
    with pytest.raises(UserError, match=r"words are given, which sum does not use"):
        merge(adapters, words=["sks", "zwx"])
    nameless = [Patch(entries=one.entries, name=f"n{k}") for k, one in enumerate(adapters)]
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"'n0' does not say what its subject is called"):
        merge(nameless, method="regmean", pipe=pipe)
    files = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for patch, file in zip(adapters, files, strict=True):
        patch.save(file)
    found = CliRunner().invoke(app, [*map(str, files), "-o", str(tmp_path / "both.safetensors"), "--method", "regmean"])
    assert "give the model" in str(found.exception)
    assert not (tmp_path / "both.safetensors").exists()
