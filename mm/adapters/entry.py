"""One entry of a patch: what changes at one module of a model.

Legend: N outputs, K inputs, r rank, D width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mm.core.errors import UserError
from mm.layers.linear import Scope

Kind = Literal["lowrank", "rows", "dense", "rotation", "bias"]
PARTS: dict[str, tuple[str, ...]] = {
    "lowrank": ("down", "up"),
    "rows": ("ids", "rows"),
    "dense": ("delta",),
    "rotation": ("rotation",),
    "bias": ("delta",),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One change. Tensors: lowrank down (r, K), up (N, r); rows ids (n,), rows (n, D); dense delta, in the
    weight's shape, (N, K) of a linear layer; rotation (N, N), W becomes rotation @ W; bias delta (N,), whose path is
    that of the bias ("proj_out.bias"). `scale`: 0 is without it, 1 in full, and the change is linear in it."""

    kind: Kind
    tensors: dict[str, Tensor]
    scale: float = 1.0
    scope: Scope | None = None

    def __post_init__(self) -> None:
        if self.kind not in PARTS or set(self.tensors) != set(PARTS[self.kind]):
            raise UserError(f"an entry of kind {self.kind!r} with {sorted(self.tensors)}; kinds and tensors: {PARTS}")
