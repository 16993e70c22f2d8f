"""One entry of a patch: what changes at one module of a model.

Legend: N outputs, K inputs, r rank, D width of an embedding, g blocks of b x b, n values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mm.core.errors import UserError
from mm.layers.linear import Scope

Kind = Literal[
    "lowrank", "rows", "dense", "rotation", "bias", "hadamard", "kron", "kron_product", "sparse", "dora",
    "oft", "output_blocks",
]  # fmt: skip
PARTS: dict[str, tuple[str, ...]] = {
    "lowrank": ("down", "up"),
    "rows": ("ids", "rows"),
    "dense": ("delta",),
    "rotation": ("rotation",),
    "bias": ("delta",),
    "hadamard": ("w1_a", "w1_b", "w2_a", "w2_b"),
    "kron": ("first", "second"),
    "kron_product": ("first", "up", "down"),
    "sparse": ("indices", "values", "size"),
    "dora": ("down", "up", "magnitude"),
    "oft": ("skew", "terms"),
    "output_blocks": ("blocks",),
}
INTEGERS = ("ids", "indices", "size", "terms")  # tensors of whole numbers
DIMS: dict[str, tuple[int, ...]] = {  # of tensors, by name
    **dict.fromkeys(("down", "up", "rows", "rotation", "skew"), (2,)),
    **dict.fromkeys(("w1_a", "w1_b", "w2_a", "w2_b", "first", "second"), (2,)),
    **dict.fromkeys(("ids", "indices", "values", "size", "terms", "magnitude"), (1,)),
    "blocks": (3,),
    "delta": (1, 2, 3, 4, 5),  # of convolutions, too
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One change of a layer. `scale`: 0 is without it, 1 in full, and the change is linear in it.

    Tensors by kind, where the layer's weight W is (N, K):

    - lowrank: down (r, K), up (N, r); the change is up down
    - rows: ids (n,), rows (n, D), of an embedding
    - dense: delta, in the weight's shape
    - rotation: rotation (N, N); W becomes rotation W, with all that was put on earlier
    - bias: delta (N,); its path is that of the bias ("proj_out.bias")
    - hadamard (LoHa): w1_a, w2_a (N, r), w1_b, w2_b (r, K); (w1_a w1_b) times (w2_a w2_b), value by value
    - kron (LoKr): first, second; their Kronecker product. kron_product: the second one is up down
    - sparse (SHiRA): values (n,) at indices (n,) of the flattened weight, whose size (2,) is N, K
    - dora: down, up, magnitude (N,); W becomes magnitude (W + up down) / its rows' norms
    - oft: skew (g, b (b - 1) / 2), the upper triangle of each block of inputs' Q, or one row for all blocks; terms (1,)
      of the series that gives R, 0 for Cayley's transform (`mm.adapters.cayley`); W becomes W R^T
    - output_blocks (OFT of outputs): blocks (g, b, b) on the diagonal of a matrix B; the change is B W

    The last three depend on W before any patch (`mm.adapters.factors`).
    """

    kind: Kind
    tensors: dict[str, Tensor]
    scale: float = 1.0
    scope: Scope | None = None

    def __post_init__(self) -> None:
        if self.kind not in PARTS or set(self.tensors) != set(PARTS[self.kind]):
            raise UserError(f"an entry of kind {self.kind!r} with {sorted(self.tensors)}; kinds and tensors: {PARTS}")
