"""Adapters of subjects for any family, large enough to be seen in pictures of a tiny model."""

from __future__ import annotations

from typing import Any

import torch

from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.customization.objectives.protocol import objective_of
from mm.families import family_of


def adapter_of(pipe: Any, word: str, seed: int, strength: float = 0.3) -> Patch:
    """Branches on some layers of a denoiser, large enough to be seen in its pictures."""
    generator, entries = torch.Generator().manual_seed(seed), {}
    named = ("unet", "transformer") if family_of(pipe).objective is None else objective_of(pipe).parts
    for name in [name for name in named if name in pipe.components]:
        root = pipe.components[name]
        layers = [(path, m) for path, m in root.named_modules() if isinstance(m, torch.nn.Linear) and "att" in path]
        for path, layer in layers[:6]:
            down = torch.randn(2, layer.in_features, generator=generator) * strength
            up = torch.randn(layer.out_features, 2, generator=generator) * strength
            entries[f"{name}.{path}"] = Entry(kind="lowrank", tensors={"down": down, "up": up})
    return Patch(entries=entries, name=f"adapter-{word}", settings={"name": word})
