"""`Branch`: one thin term of a linear layer, and how several of them are laid side by side for one op.

Legend: N outputs, K inputs, r rank of one branch, R rows of all branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mm.core.errors import UserError

RANK_STEP = 16
Scope = Literal["text", "picture"]
_split: ContextVar[int | None] = ContextVar("mm_token_split", default=None)


@contextmanager
def token_split(text_tokens: int) -> Iterator[None]:
    """Says where text ends inside a sequence, for branches that act on one scope of tokens.

    Args:
        text_tokens: sequences are this many tokens of text followed by picture tokens.
    """
    token = _split.set(text_tokens)
    try:
        yield
    finally:
        _split.reset(token)


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """One thin term: y += scale * (x down^T) up^T, down (r, K), up (N, r), on all tokens or on one scope of them."""

    name: str
    down: Tensor
    up: Tensor
    scale: float = 1.0
    origin: str = "lora"
    scope: Scope | None = None

    def __post_init__(self) -> None:
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            raise ValueError(
                f"branch {self.name!r}: down {tuple(self.down.shape)} and up {tuple(self.up.shape)} make no product"
            )

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def token_range(self) -> tuple[slice, int]:
        """The tokens that a scoped branch acts on, and where text ends.

        Raises:
            UserError: outside `token_split`.
        """
        split = _split.get()
        if split is None:
            raise UserError(
                f"branch {self.name!r} acts on {self.scope} tokens only, and nothing says which those are; "
                "run the model inside mm.layers.linear.token_split(text_tokens)"
            )
        return (slice(None, split) if self.scope == "text" else slice(split, None)), split


@dataclass(frozen=True, kw_only=True, eq=False)
class Joined:
    """Branches side by side: down (R, K), up (N, R), scales (R,) in fp32; R is a multiple of 16, zeros at the end."""

    down: Tensor | None = None
    up: Tensor | None = None
    scales: Tensor | None = None
    places: dict[str, slice] = field(default_factory=dict)


def join(
    parts: Sequence[tuple[str, Tensor, Tensor, float]], inputs: int, outputs: int, device: torch.device,
    dtype: torch.dtype,
) -> Joined:  # fmt: skip
    """Copies branches side by side.

    Args:
        parts: (name, down, up, scale) of each, in order.
        inputs: K.
        outputs: N.
        device: of the result.
        dtype: of `down` and `up`.

    Returns:
        The joined branches; ordinary tensors, also where this is called under `torch.inference_mode`.
    """
    if not parts:
        return Joined()
    rank = sum(down.shape[0] for _, down, _, _ in parts)
    rows = -(-rank // RANK_STEP) * RANK_STEP
    with torch.inference_mode(False), torch.no_grad():
        joined_RK = torch.zeros(rows, inputs, device=device, dtype=dtype)
        joined_NR = torch.zeros(outputs, rows, device=device, dtype=dtype)
        scales_R, places, start = torch.zeros(rows, device=device), {}, 0
        for name, down, up, scale in parts:
            spot = slice(start, start + down.shape[0])
            joined_RK[spot] = down.detach().to(device, dtype)
            joined_NR[:, spot] = up.detach().to(device, dtype)
            scales_R[spot] = scale
            places[name], start = spot, spot.stop
    return Joined(down=joined_RK, up=joined_NR, scales=scales_R, places=places)
