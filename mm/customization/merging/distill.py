"""Adapters merged by training: one set of branches learns what each adapter does, and how two subjects stand together.

Source: Gu et al. 2023, Mix-of-Show, arXiv 2305.18292, fit merged layers to what single-concept models do; Hinton et al.
2015, arXiv 1503.02531, train on a teacher's outputs instead of its data; Kumari et al. 2022, arXiv 2212.04488, train
two subjects together. Here the merged adapter is fitted to the adapters' predictions, not layer by layer, so that the
error of a layer is corrected by those that follow. No training pictures are needed.

Design choices
- The branches start at the solution by least squares (`mm.customization.merging.regmean`), and keep its ranks.
- A step has predictions of several adapters, one of the base, and a picture of two subjects (`.teachers`).
- The words' rows are those of the adapters, and stay.
- Step k depends on (seed, k) alone.

Legend: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.adapters.acting import acting
from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.core.checks import number, whole
from mm.customization.batches import hash_of
from mm.customization.config import MAX_SETTING
from mm.customization.merging.regmean import OnProgress
from mm.customization.merging.teachers import Targets, Teachers
from mm.customization.objectives.protocol import Objective, objective_of, weighted_mse
from mm.customization.pieces import Branches, frozen
from mm.layers.checkpointing import checkpointed


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Settings.

    Attributes:
        updates: of training for each adapter.
        adapters: whose predictions are in a step; one of the base and one picture of two subjects are added.
        pairs: pictures of two subjects, for each subject.
        learning_rate: of the branches; it falls to a tenth (cosine).
        clip: largest norm of the gradient.
    """

    updates: int = 250
    adapters: int = 2
    pairs: int = 6
    learning_rate: float = 5e-4
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("updates", 1), ("adapters", 1), ("pairs", 0)):
            whole(name, getattr(self, name), least, MAX_SETTING)
        for name in ("learning_rate", "clip"):
            number(name, getattr(self, name), 1e-12, MAX_SETTING)


@dataclass(frozen=True, kw_only=True, eq=False)
class Distilled:
    """What came out.

    Attributes:
        entries: of the merged layers.
        first: error on the predictions of the adapters before training, as a share of what the adapters change.
        last: the same afterwards.
        pairs: pictures of two subjects that were made.
        pairs_first: error on them before training, as a share of what is wanted beyond the base.
        pairs_last: the same afterwards.
    """

    entries: dict[str, Entry]
    first: float
    last: float
    pairs: int
    pairs_first: float
    pairs_last: float

    def report(self) -> dict[str, Any]:
        """What a merged patch's report says of it."""
        return {
            "error_before": self.first, "error": self.last, "pairs": self.pairs,
            "pairs_error_before": self.pairs_first, "pairs_error": self.pairs_last,
        }  # fmt: skip


def distill(
    pipe: Any, patches: Sequence[Patch], words: Sequence[str], weights: Sequence[float], start: Mapping[str, Entry],
    others: Patch | None, *, seed: int, steps: int | None = None,
    config: Distillation | None = None, progress: OnProgress = lambda share, text: None,
) -> Distilled:  # fmt: skip
    """Trains merged layers.

    Args:
        pipe: the model, with no patch on it; it is unchanged afterwards.
        patches: the adapters.
        words: what each is called in prompts.
        weights: how strongly each acts.
        start: low-rank entries by path, which are trained.
        others: a patch of what is not trained, such as the words' rows; None for nothing.
        seed: of drawings and training.
        steps: of sampling; None takes the pipeline's own.
        config: see `Distillation`.
        progress: called with a share and a text.
    """
    config = Distillation() if config is None else config
    objective = objective_of(pipe)
    teachers = Teachers(objective, patches, words, weights, seed=seed, steps=steps, progress=progress)
    pairs = teachers.pairs(config.pairs, progress) if len(patches) > 1 and config.pairs else []
    of_pairs = teachers.of_pairs(pairs)
    with ExitStack() as stack:
        for context in (frozen(pipe), acting(pipe, others), checkpointed(list(objective.modules().values()))):
            stack.enter_context(context)
        if objective.open_vocabulary:  # the words' rows are as they are, and branches lie in the denoiser
            stack.enter_context(objective.remembering())
        branches = Branches(
            objective, list(start), rank=1, seed=seed, origin="distill",
            downs={path: entry.tensors["down"].float() for path, entry in start.items()},
        )  # fmt: skip
        try:
            with torch.no_grad():
                for path, entry in start.items():
                    branches.up[path].copy_(entry.scale * entry.tensors["up"].float())
            sets = (teachers.own, [] if of_pairs is None else [of_pairs])
            first = [_error(objective, each, branches) for each in sets]
            _train(objective, teachers, of_pairs, branches, config, seed, len(patches), progress)
            last = [_error(objective, each, branches) for each in sets]
            return Distilled(
                entries=branches.entries(), first=first[0], last=last[0], pairs=len(pairs), pairs_first=first[1],
                pairs_last=last[1],
            )  # fmt: skip
        finally:
            branches.remove()


@torch.enable_grad()
def _train(
    objective: Objective, teachers: Teachers, of_pairs: Targets | None, branches: Branches,
    config: Distillation, seed: int, count: int, progress: OnProgress,
) -> None:  # fmt: skip
    parameters = list(branches.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    total = config.updates * count
    for at in range(total):
        for group in optimizer.param_groups:
            warm = min(1.0, (at + 1) / 10)
            group["lr"] = config.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * at / total)))
        generator = torch.Generator().manual_seed(hash_of(seed + 3, at))
        noisy, level_B, prompts, wanted = _batch(objective, teachers, of_pairs, config.adapters, generator)
        given = objective.predict(noisy, level_B, objective.conditions(prompts))
        loss = weighted_mse(given, wanted, None).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        progress(at / total, f"update {at + 1} of {total}, loss {float(loss.detach()):.4f}")


def _batch(
    objective: Objective, teachers: Teachers, of_pairs: Targets | None, most: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """A step's latents, levels, prompts and what is wanted."""
    chosen = [teachers.own[k] for k in torch.randperm(len(teachers.own), generator=generator)[:most].tolist()]
    sets = [*chosen, teachers.other, *([] if of_pairs is None else [of_pairs])]
    rows = [(each, int(torch.randint(len(each), (), generator=generator))) for each in sets]
    device = objective.device
    return (
        torch.stack([each.noisy[k] for each, k in rows]).to(device),
        torch.stack([each.level_M[k] for each, k in rows]).to(device),
        [each.prompts[k] for each, k in rows],
        torch.stack([each.wanted[k] for each, k in rows]).to(device),
    )


@torch.no_grad()
def _error(objective: Objective, sets: Sequence[Targets], branches: Branches, most: int = 32) -> float:
    """Error on some of the targets, as a share of what is wanted there beyond the base."""
    error, size = 0.0, 0.0
    branches.settle()
    for each in sets:
        part = slice(0, len(each), max(1, len(each) // most))
        error += _distance(objective, each, part)
        with branches.off():
            size += _distance(objective, each, part)
    return round((error / max(size, 1e-30)) ** 0.5, 4)


def _distance(objective: Objective, each: Targets, part: slice) -> float:
    device = objective.device
    condition = objective.conditions(each.prompts[part])
    given = objective.predict(each.noisy[part].to(device), each.level_M[part].to(device), condition)
    return float((given.cpu() - each.wanted[part]).square().mean())
