"""S2FT: whole channels are trained, the same on both sides of a feed-forward block and of an attention.

Source: Yang et al. 2024, "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", arXiv
2412.06289.

Design choices
- A block's channels are chosen once: its first layers are trained in the rows that make them, its last layer in the
  columns that read them. What is trained is then a smaller block of the same kind, and everything else stays.
- Channels of an attention are neighbours, so that they lie in as few heads as possible; those of a feed-forward block
  are drawn at random. A layer that makes several values a channel (gated, or q, k and v in one) has all their rows.
- Rows and columns are branches with a fixed `up` or `down`, so that they go onto 4-bit layers as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.customization.methods.paca import picks
from mm.customization.methods.protocol import Job, Learner, sites_of, with_word
from mm.customization.pieces import Branches, layer_seed
from mm.layers.sites import Site
from mm.layers.surgery import roots_of, submodule

_LAST = re.compile(r"(?:ff_down|.*_out)")  # roles of a block's last layers
_NAME = re.compile(r"\.(?:to_|add_|up|down|net|proj|linear|gate|fc|w\d)[^.]*(?:\..*)?$")


class S2FT:
    """`rank` channels of each block."""

    name = "s2ft"
    defaults: Mapping[str, Any] = {"rank": 8, "layers": "all", "learning_rate": 3e-4}

    def begin(self, job: Job) -> Learner:
        """The channels, and the name's row where the vocabulary is closed."""
        sites = sites_of(job.objective, job.settings["layers"])
        rank, roots = job.settings["rank"], roots_of(job.objective.pipe)
        shapes = {site.path: _shape(roots, site.path) for site in sites}
        width = block_widths(sites, shapes)
        downs: dict[str, Tensor] = {}
        ups: dict[str, Tensor] = {}
        for site in sites:
            outputs, inputs = shapes[site.path]
            block = block_of(site)
            if _LAST.fullmatch(site.role):
                downs[site.path] = picks(_channels(block, site, inputs, rank, job.seed), inputs)
            else:
                each = width.get(block, outputs)
                each = each if outputs % each == 0 else outputs
                rows = _channels(block, site, each, rank, job.seed)
                rows = torch.cat([rows + k * each for k in range(outputs // each)])
                ups[site.path] = picks(rows, outputs).T.contiguous()
        paths = [site.path for site in sites]
        pieces = with_word(
            job,
            lambda: Branches(
                job.objective, paths, rank=rank, seed=job.seed, downs=downs, frozen_down=True, ups=ups,
                origin=self.name,
            ),
        )  # fmt: skip
        return Learner(job=job, pieces=pieces)


def block_of(site: Site) -> str:
    """The path of the block that a layer belongs to."""
    return _NAME.sub("", site.path)


def block_widths(sites: Sequence[Site], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Channels of each block: the inputs of its last layer."""
    return {block_of(site): shapes[site.path][1] for site in sites if _LAST.fullmatch(site.role)}


def _channels(block: str, site: Site, width: int, count: int, seed: int) -> Tensor:
    count = min(count, width)
    generator = layer_seed(block, seed)
    if site.role.startswith("ff"):
        return torch.randperm(width, generator=generator)[:count].sort().values
    first = int(torch.randint(width // count, (), generator=generator)) * count
    return torch.arange(first, first + count)


def _shape(roots: Mapping[str, nn.Module], path: str) -> tuple[int, int]:
    component, _, below = path.partition(".")
    layer = submodule(roots[component], below)
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features
