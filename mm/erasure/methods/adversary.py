"""An adversary that optimizes embeddings against an erasure, and what the edited layers then read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import nn

from mm.adapters.patch import Patch
from mm.erasure.alignment import matched, moved
from mm.erasure.embeddings import Embeddings, distances
from mm.erasure.gradients import outputs
from mm.erasure.methods.protocol import Job
from mm.erasure.solver import Features
from mm.layers.surgery import roots_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What an attack reached: features for the first path of each group, and its distance before and after."""

    features: dict[str, Features]
    distances: tuple[float, float]


@torch.enable_grad()
def adversarial_features(
    job: Job, patch: Patch, pairs: Sequence[tuple[str, str]], iterations: int, rate: float
) -> Found:
    """Searches embeddings for the targets' prompts under a patch, and records what the edited layers read then.

    Args:
        job: the erasure in the making; its pipeline does not carry the patch.
        patch: the erasure so far.
        pairs: prompts with the target, and with the anchor in its place.
        iterations: of Adam.
        rate: learning rate, in units of the embeddings' deviation.
    """
    targets, pipe = [t for t, _ in pairs], job.pipe
    firsts = {group[0]: job.layers[group[0]] for group in job.groups}
    wanted = outputs(pipe, job.layers, targets, grad=False)
    anchors = outputs(pipe, firsts, [*targets, *[a for _, a in pairs]], grad=False, reads=True)
    search = Embeddings(pipe, rate)
    patch.apply(pipe)
    try:
        edited = {path: _named(pipe, path) for path in job.layers}
        with search.on():
            first: list[float] = []
            for _ in range(iterations):
                losses = distances(outputs(pipe, edited, targets, grad=True), wanted)
                first = first or losses.tolist()
                search.step(losses)
            last = search.take_best()
            read = outputs(pipe, {p: edited[p] for p in firsts}, targets, grad=False, reads=True)
    finally:
        patch.undo(pipe)
    features, n = {}, len(pairs)
    for path in firsts:
        rows, goals = [], []
        for i, (target, anchor) in enumerate(pairs):
            here, there = matched(pipe, target, anchor, read[path].shape[1])
            here, there = (moved(places, job.template, read[path].shape[1]) for places in (here, there))
            rows.append(read[path][i][here])
            goals.append(anchors[path][n + i][there])
        x, goal = (torch.cat(parts).detach().double().cpu() for parts in (rows, goals))
        features[path] = Features(target_TD=x, anchor_TD=goal, retained_RD=goal[:0])
    return Found(features=features, distances=(round(mean(first), 4), round(mean(last), 4)))


def _named(pipe: Any, path: str) -> nn.Module:
    """The layer at a path below a pipeline, as it is now: applying a patch may replace it."""
    component, _, rest = path.partition(".")
    roots = roots_of(pipe)
    return roots[component].get_submodule(rest) if component in roots else roots[""].get_submodule(path)
