"""Velocity projection, after DVE (arXiv 2602.01089): the picture side's features of the target become the anchor's.

No text-reading layer is touched. From the same noise the target's and the anchor's prompts are drawn side by side; at
the layer through which the denoiser's features reach its prediction, the target's features are mapped onto the
anchor's, and retained prompts' features stay. That is UCE's closed form on picture tokens, which match by their place.
DVE fits a decoder that never reads text; where a family has one (mm-tiny's velocity decoder), its entry is the site.

Legend: B pictures, L picture tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.erasure import solver
from mm.erasure.gradients import predict
from mm.erasure.methods.protocol import Job, Made, lacking
from mm.erasure.methods.uce import entry_of
from mm.families.registry import is_denoiser
from mm.layers.linear import BranchedLinear
from mm.layers.surgery import linears, roots_of

# Where features of the picture reach the prediction: mm-tiny's decoders, then the usual names of last projections.
SITES = (r"feature_in", r"proj_out", r"final_layer\.linear", r"all_final_layer\..*\.linear", r".*\.proj_out")
CHUNK = 16


class DVE:
    """One closed form for each site."""

    name = "dve"
    defaults: dict[str, Any] = {  # noqa: RUF012
        "preserve": 2.0, "ridge": 1e-3, "rank": 64, "prompts": 48, "steps": 4,
    }  # fmt: skip

    def make(self, job: Job) -> Made:
        """Features of all steps have the same weight."""
        s, sites = job.settings, picture_sites(job.pipe)
        pairs, kept = list(job.pairs)[: s["prompts"]], list(job.retained)[: s["prompts"]]
        read = self._features(job, sites, [*[t for t, _ in pairs], *[a for _, a in pairs], *kept])
        entries, facts = {}, {}
        for path, layer in sites.items():
            if path not in read:
                continue
            x, n = read[path], len(pairs)
            moments = solver.Features(
                target_TD=x[:n].flatten(0, -2), anchor_TD=x[n : 2 * n].flatten(0, -2),
                retained_RD=torch.cat([x[n : 2 * n].flatten(0, -2), x[2 * n :].flatten(0, -2)]),
            ).moments  # fmt: skip
            found = solver.ridge(moments, strength=float(job.targets), preserve=s["preserve"], ridge=s["ridge"])
            second = moments.target_DD + moments.kept_DD
            up, down, lost = solver.low_rank(found.change_DD * job.strength, second, s["rank"])
            weight = layer.effective_weight() if isinstance(layer, BranchedLinear) else layer.weight
            entries[path] = entry_of(weight.detach().double().cpu() @ up, down)
            facts[path] = {
                "condition": found.condition, "target_error": found.target_error,
                "retained_error": found.retained_error, "truncation_lost": lost,
            }  # fmt: skip
        if not entries:
            raise UserError(f"none of the sites of {type(job.pipe).__name__} ran while it drew; dve needs one")
        return Made(entries=entries, report={"groups": facts})

    def _features(self, job: Job, sites: Mapping[str, nn.Linear], prompts: Sequence[str]) -> dict[str, Tensor]:
        """What each site reads at every step, (B, S * L, D) in float64."""
        steps = job.settings["steps"]
        half = len(job.pairs[: job.settings["prompts"]])
        rows: dict[str, list[Tensor]] = {}
        # Target and anchor of a pair start from the same noise: chunks of both are drawn with the same seed.
        starts = [(a, min(a + CHUNK, b)) for b0, b in ((0, half), (half, 2 * half), (2 * half, len(prompts)))
                  for a in range(b0, b, CHUNK)]  # fmt: skip
        for start, stop in starts:
            chunk = list(prompts[start:stop])
            seen: dict[str, list[Tensor]] = {path: [] for path in sites}
            handles = [layer.register_forward_pre_hook(_keeper(seen[path])) for path, layer in sites.items()]
            try:
                predict(job.pipe, chunk, seed=start % half if start < 2 * half else start, step=steps - 1, steps=steps)
            finally:
                for handle in handles:
                    handle.remove()
            for path, parts in seen.items():
                if parts:
                    made = [x[-len(chunk) :].reshape(len(chunk), -1, x.shape[-1]) for x in parts]
                    rows.setdefault(path, []).append(torch.cat(made, 1))
        return {path: torch.cat(parts).double() for path, parts in rows.items()}


def _keeper(into: list[Tensor]) -> Any:
    def before(module: nn.Module, args: Any) -> None:
        into.append(args[0].detach().float().cpu())

    return before


def picture_sites(pipe: Any) -> dict[str, nn.Linear]:
    """The layers through which picture features reach the prediction, by path.

    Raises:
        UserError: where there is none.
    """
    found: dict[str, nn.Linear] = {}
    for pattern in SITES:
        for name, root in roots_of(pipe).items():
            if is_denoiser(root):
                found |= {f"{name}.{p}".strip("."): m for p, m in linears(root) if re.fullmatch(pattern, p)}
        if found:
            return found
    raise lacking(pipe, "dve", "linear projection of picture features")
