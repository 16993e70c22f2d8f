"""Where a model reads text: the layers that erasure edits.

Keys and values of cross-attention where there are such (UNets, PixArt, SANA, mm-tiny, joint attention's added
projections), else the projection of the text encoder's output into the denoiser.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from mm.core.errors import UserError
from mm.layers.sites import find_sites
from mm.layers.surgery import linears, roots_of

_PROJECTION = re.compile(
    r"(?:.*\.)?(?:context_embedder|caption_projection(?:\.linear_\d)?|txt_in|cap_embedder\.\d|text_proj|caption_embedder)"
)


def text_layers(pipe: Any, patterns: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """The linear layers of a pipeline that read text, by path below the pipeline.

    Args:
        pipe: a pipeline or a module.
        patterns: regular expressions for whole paths, instead of the choice by roles.

    Raises:
        UserError: where there are none.
    """
    found: dict[str, nn.Linear] = {}
    roots = {
        n: r for n, r in roots_of(pipe).items() if not re.search(r"text_encoder|vae|tokenizer|safety|image_enc", n)
    }
    for name, root in roots.items():
        layers = {f"{name}.{path}".strip("."): layer for path, layer in linears(root)}
        if patterns:
            found |= {p: layer for p, layer in layers.items() if any(re.fullmatch(pattern, p) for pattern in patterns)}
            continue
        sites = {f"{name}.{s.path}".strip("."): s for s in find_sites(root)}
        cross = {p: layers[p] for p, s in sites.items() if s.role.startswith("cross_") and s.reads == "text"}
        found |= cross or {p: layer for p, layer in layers.items() if _PROJECTION.fullmatch(p)}
    if not found:
        raise UserError(
            f"{type(pipe).__name__} has no layer that is known to read text; name the layers with sites=[...], as "
            "regular expressions over paths"
        )
    return found


def groups_of(layers: dict[str, nn.Linear], features: dict[str, list[Any]]) -> list[list[str]]:
    """Layers that read the same features, so that one solution serves them: first by width, then by value."""
    groups: list[list[str]] = []
    for path in layers:
        first = features[path][0]
        for group in groups:
            other = features[group[0]][0]
            if other.shape == first.shape and bool((other == first).all()):
                group.append(path)
                break
        else:
            groups.append([path])
    return groups
