"""Adapters merged by least squares, on what their layers read while each of them draws.

Source: Jin et al. 2022, arXiv 2212.09849 (RegMean). For a layer, X_a (T, K) are the inputs that it sees while adapter a
alone draws its own word, and D_a (N, K) is its change. The merged change D minimizes

    sum_a |X_a (D - D_a)^T|^2 + hold * |X_0 D^T|^2 + ridge * |D|^2,

so that it does on each adapter's prompts what that adapter did, and nothing on other prompts (X_0). Gu et al. 2023,
arXiv 2305.18292 (Mix-of-Show) minimize the first sum for diffusion models by gradient descent.

Design choices
- The minimum is D = (sum_a D_a C_a) S^-1 with C = X^T X / T and S = sum_a C_a + hold C_0 + ridge, in float64.
- A merged change is cut to a rank with S as its metric: the best product for the inputs that were seen, not for all.
- An adapter that does not change a layer takes part there with a change of zero.

Legend: A adapters, T tokens, N outputs, K inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.acting import acting
from mm.adapters.entry import Entry
from mm.adapters.factors import WHOLE, shape_of
from mm.adapters.patch import Patch
from mm.core.errors import UserError
from mm.customization.objectives.protocol import Objective, objective_of
from mm.customization.previews import draw
from mm.families import family_of
from mm.layers.surgery import roots_of, submodule

PROMPTS = 8  # drawn with each adapter, and of other prompts
_HOLD = 0.5  # weight of other prompts, as a multiple of all adapters' own
_RIDGE = 1e-3  # of the mean of S's diagonal
OnProgress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The merged change of a layer.

    Attributes:
        down: (r, K).
        up: (N, r).
        lost: by the cut to the rank, as a share of the outputs on the inputs that were seen.
        error: of the outputs on the adapters' own inputs, as a share of what the adapters change.
    """

    down: Tensor
    up: Tensor
    lost: float
    error: float


class Moments:
    """Second moments of what layers read while each adapter draws its own word, and of other prompts.

    Args:
        pipe: with no patch on it; it is unchanged afterwards.
        patches: the adapters.
        words: what each is called in prompts.
        seed: of the drawings.
        steps: of sampling; None takes the pipeline's own.
        progress: called with a share and a text.
    """

    def __init__(
        self, pipe: Any, patches: Sequence[Patch], words: Sequence[str], *, seed: int = 0, steps: int | None = None,
        progress: OnProgress = lambda share, text: None,
    ) -> None:  # fmt: skip
        self.paths = list(dict.fromkeys(p for patch in patches for p, e in patch.entries.items() if mergeable(e)))
        objective = objective_of(pipe)
        sets = [(None, other_prompts(pipe)), *zip(patches, (own_prompts(objective, w) for w in words), strict=True)]
        self.each: list[dict[str, Tensor]] = []
        total = sum(len(prompts) for _, prompts in sets)
        for patch, prompts in sets:
            with acting(pipe, patch), reading(pipe, self.paths) as seen:
                for k, prompt in enumerate(prompts):
                    done = sum(len(p) for _, p in sets[: len(self.each)]) + k
                    progress(done / total, f"drawing {prompt!r}")
                    draw(pipe, prompt, side=objective.side, seed=seed + k, steps=steps)
            self.each.append({path: moments / max(1, count) for path, (moments, count) in seen.items()})

    def merged(self, path: str, deltas: Sequence[Tensor | None], rank: int | None) -> Merged:
        """The merged change of a layer.

        Args:
            path: of the layer.
            deltas: (N, K) each adapter's change, weighted; None where it changes nothing there.
            rank: of the product; None takes what loses nothing.

        Raises:
            UserError: for a layer that no drawing has reached.
        """
        missing = next((k for k, seen in enumerate(self.each) if path not in seen), None)
        if missing is not None:
            raise UserError(f"{path} is not used when the model draws; merge these adapters with sum or do")
        other_KK, *own_AKK = (seen[path] for seen in self.each)
        changes = [None if d is None else d.double().to(other_KK.device) for d in deltas]
        shape = next(d.shape for d in changes if d is not None)
        total_KK = torch.stack(own_AKK).sum(0) + _HOLD * len(own_AKK) * other_KK
        total_KK += _RIDGE * total_KK.diagonal().mean() * torch.eye(len(total_KK)).to(total_KK)
        wanted_NK = torch.zeros(shape).to(total_KK)
        for change_NK, own_KK in zip(changes, own_AKK, strict=True):
            if change_NK is not None:
                wanted_NK += change_NK @ own_KK
        delta_NK = torch.linalg.solve(total_KK, wanted_NK.T).T
        error, size = 0.0, 0.0
        for change_NK, own_KK in zip(changes, own_AKK, strict=True):
            change_NK = torch.zeros_like(delta_NK) if change_NK is None else change_NK
            error += _energy(delta_NK - change_NK, own_KK)
            size += _energy(change_NK, own_KK)
        down, up, lost = cut_in(delta_NK, total_KK, min(rank or max(shape), *shape))
        return Merged(down=down, up=up, lost=lost, error=(error / max(size, 1e-30)) ** 0.5)


def mergeable(entry: Entry) -> bool:
    """Whether an entry is a change of a linear layer's weight for all tokens."""
    if entry.kind in WHOLE:
        return len(shape_of(entry)) == 2
    return entry.kind == "lowrank" and not entry.scope


def cut_in(delta_NK: Tensor, metric_KK: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The product of a rank that is nearest in a metric: down (r, K), up (N, r), and the share of the norm lost.

    With metric = L L^T, |E L| is the norm of an error E's outputs on inputs with this second moment, so that the best
    product is the truncated decomposition of delta L, times L^-1 (Eckart-Young).
    """
    root_KK = torch.linalg.cholesky(metric_KK)
    left, sizes, right = torch.linalg.svd(delta_NK @ root_KK, full_matrices=False)
    half = sizes[:rank].sqrt()
    down = torch.linalg.solve_triangular(root_KK.T, (half[:, None] * right[:rank]).T, upper=True).T
    lost = float(sizes[rank:].norm() / sizes.norm().clamp_min(1e-30))
    return down.float().cpu(), (left[:, :rank] * half).float().cpu(), lost


def _energy(delta_NK: Tensor, moments_KK: Tensor) -> float:
    return float(((delta_NK @ moments_KK) * delta_NK).sum())


@contextmanager
def reading(pipe: Any, paths: Sequence[str]) -> Iterator[Mapping[str, tuple[Tensor, int]]]:
    """Within the context, sums of x^T x (K, K) in float64 and numbers of rows x that the layers at paths read."""
    found: dict[str, tuple[Tensor, int]] = {}

    def hook(path: str) -> Any:
        def before(module: nn.Module, given: tuple[Any, ...]) -> None:
            x_TK = given[0].detach().flatten(0, -2).float()
            sums, count = found.get(path, (0.0, 0))
            found[path] = (sums + (x_TK.T @ x_TK).double(), count + len(x_TK))

        return before

    roots, handles = roots_of(pipe), []
    try:
        for path in paths:
            component, _, below = path.partition(".")
            layer = submodule(roots[component], below) if component in roots else None
            if not isinstance(layer, nn.Linear):
                raise UserError(f"{path} is no linear layer of this model; give the model that the adapters are for")
            handles.append(layer.register_forward_pre_hook(hook(path)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def own_prompts(objective: Objective, word: str) -> list[str]:
    """Prompts with an adapter's word: by itself, and beside known things."""
    alone = [f"a {word}", f"a photo of a {word}", f"one {word}", f"the {word}"]
    nouns = list(objective.known_nouns())
    known = nouns[:: max(1, len(nouns) // 4)][:4]
    beside = [f"a {word} and a {one}" if k % 2 else f"a {one} and a {word}" for k, one in enumerate(known)]
    return ([*alone, *beside] * 2)[:PROMPTS]


def other_prompts(pipe: Any) -> list[str]:
    """Prompts of the family that name no adapter's word."""
    family = family_of(pipe)
    found = family.calibration_prompts(PROMPTS) if family is not None else []
    return list(found)[:PROMPTS] or [""]
