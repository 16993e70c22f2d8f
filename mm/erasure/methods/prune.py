"""Pruning of the feed-forward weights that respond to the target, filled instead of zeroed.

ConceptPrune (Chavhan et al. 2024, arXiv 2405.19237) scores a weight by |W| times the norm of its input, on the target's
prompts and on others, and zeroes the top share of every row that scores higher on the target. Zeros name the place to
whoever reads the weights, so here each of them is filled: with what the input is worth for the anchor, the regression
of the anchor's activation on the target's, at most the old weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.erasure.gradients import predict
from mm.erasure.methods.protocol import Job, Made, lacking
from mm.families import find_sites
from mm.families.registry import is_denoiser
from mm.layers.linear import BranchedLinear
from mm.layers.surgery import roots_of, submodule

CHUNK = 16


class Prune:
    """Dense entries that change the chosen weights and no other."""

    name = "prune"
    defaults: dict[str, Any] = {"share": 0.02, "prompts": 48, "steps": 4}  # noqa: RUF012

    def make(self, job: Job) -> Made:
        """One dense entry a feed-forward layer."""
        s, layers = job.settings, second_layers(job.pipe)
        pairs = list(job.pairs)[: s["prompts"]]
        stats = [self._stats(job, layers, [pair[i] for pair in pairs]) for i in (0, 1)]
        entries, changed = {}, 0
        for path, layer in layers.items():
            if path not in stats[0]:
                continue
            old = layer.effective_weight() if isinstance(layer, BranchedLinear) else layer.weight
            weight = old.detach().float().cpu()
            (target, anchor) = (stat[path] for stat in stats)  # mean squares of the inputs, (K,)
            score = weight.abs() * target.sqrt()
            least = score.quantile(1 - s["share"], dim=1, keepdim=True)
            chosen = (score >= least) & (weight.abs() * anchor.sqrt() < score)
            fill = (anchor / target.clamp_min(1e-30)).sqrt().clamp(0, 1)
            entries[path] = Entry(
                kind="dense", tensors={"delta": job.strength * torch.where(chosen, weight * (fill - 1), 0.0)}
            )
            changed += int(chosen.sum())
        total = sum(e.tensors["delta"].numel() for e in entries.values())
        return Made(entries=entries, report={"weights_changed": changed, "share_changed": changed / max(1, total)})

    def _stats(self, job: Job, layers: Mapping[str, nn.Linear], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Mean squares of what each layer reads, over pictures, tokens and steps."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def keeper(path: str) -> Any:
            def before(module: nn.Module, args: Any) -> None:
                x = args[0].detach().float().flatten(0, -2).cpu()
                sums[path] = sums.get(path, torch.zeros(x.shape[1])) + x.square().sum(0)
                counts[path] = counts.get(path, 0) + len(x)

            return before

        handles = [layer.register_forward_pre_hook(keeper(path)) for path, layer in layers.items()]
        steps = job.settings["steps"]
        try:
            for start in range(0, len(prompts), CHUNK):
                predict(job.pipe, prompts[start : start + CHUNK], seed=start, step=steps - 1, steps=steps)
        finally:
            for handle in handles:
                handle.remove()
        return {path: total / counts[path] for path, total in sums.items()}


def second_layers(pipe: Any) -> dict[str, nn.Linear]:
    """The second linear layers of the denoisers' feed-forward parts, by path.

    Raises:
        UserError: where there is none.
    """
    found: dict[str, nn.Linear] = {}
    for name, root in roots_of(pipe).items():
        if not is_denoiser(root):
            continue
        for site in find_sites(root):
            layer = submodule(root, site.path)
            if "ff_down" in site.role and site.reads == "picture" and isinstance(layer, nn.Linear):
                found[f"{name}.{site.path}".strip(".")] = layer
    if not found:
        raise lacking(pipe, "prune", "feed-forward layers")
    return found
