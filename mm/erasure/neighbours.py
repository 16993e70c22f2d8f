"""Which concepts are near another one, by what the model's own text-reading layers read.

A concept's vector is the mean of its features over its tokens at the last text-reading layer, centred over all
candidates, so that what every prompt has in common does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.erasure.features import record


class Neighbours:
    """Similarities among candidate concepts."""

    def __init__(self, pipe: Any, layers: Mapping[str, nn.Module], names: Sequence[str]) -> None:
        self.names = list(dict.fromkeys(names))
        last = next(reversed(list(layers)))
        features = record(pipe, {last: layers[last]}, self.names)[last]
        means = torch.stack([x.double().mean(0) for x in features])
        self.vectors: Tensor = torch.nn.functional.normalize(means - means.mean(0), dim=1)

    def nearest(self, name: str, count: int, without: Sequence[str] = ()) -> list[str]:
        """The names nearest to one of them, the nearest first."""
        similar = self.vectors @ self.vectors[self.names.index(name)]
        order = sorted(range(len(self.names)), key=lambda i: -float(similar[i]))
        return [self.names[i] for i in order if self.names[i] not in {name, *without}][:count]

    def similarity(self, one: str, other: str) -> float:
        """Cosine similarity of two names, -1 to 1."""
        return float(self.vectors[self.names.index(one)] @ self.vectors[self.names.index(other)])
