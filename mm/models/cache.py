"""Key/value caches of the trunk: `PromptCache` for picture tokens, `TextState` for further text.

Design choices
- Plain frozen tuples of tensors: a cache can be repeated, selected and joined, and is never changed in place.
- A source picture's keys and values follow the prompt's in the same cache, so that drawing attends to one sequence.
- Text continues from a `TextState`: a new turn or a generated word costs only its own tokens.

Legend: B batch, T tokens, H heads, E channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._pytree import GetAttrKey, register_pytree_node


@dataclass(frozen=True, slots=True)
class PromptCache:
    """What picture tokens attend to: per layer keys and values (B, T, H, E), and which of the T tokens are real."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mask_BT: torch.Tensor

    def __len__(self) -> int:
        return self.mask_BT.shape[0]

    def repeat(self, n: int) -> PromptCache:
        """Every prompt `n` times in a row."""
        return self._map(lambda x: x.repeat_interleave(n, 0))

    def select(self, index: torch.Tensor | slice) -> PromptCache:
        """The prompts at `index`."""
        return self._map(lambda x: x[index])

    def pad(self, length: int) -> PromptCache:
        """Masked tokens appended up to `length`."""
        extra = length - self.mask_BT.shape[1]
        if extra < 0:
            raise ValueError(f"a cache of {self.mask_BT.shape[1]} tokens cannot be padded to {length}")
        grown = self._map(lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, extra)))
        return grown if extra else self

    def to(self, device: torch.device | str) -> PromptCache:
        """The same on another device."""
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PromptCache:
        return PromptCache(tuple(map(change, self.keys)), tuple(map(change, self.values)), change(self.mask_BT))

    @staticmethod
    def cat(caches: Sequence[PromptCache]) -> PromptCache:
        """Several caches as one batch, padded to the longest."""
        longest = max(c.mask_BT.shape[1] for c in caches)
        padded = [c.pad(longest) for c in caches]
        return PromptCache(
            tuple(map(torch.cat, zip(*(c.keys for c in padded), strict=True))),
            tuple(map(torch.cat, zip(*(c.values for c in padded), strict=True))),
            torch.cat([c.mask_BT for c in padded]),
        )


@dataclass(frozen=True, slots=True)
class TextState:
    """An encoded text: per layer its own keys and values (B, T, H, E), and what picture tokens attend to of it."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    prompt: PromptCache
    pointer_targets: tuple[torch.Tensor, torch.Tensor] | None = None  # see `mm.models.number_copy`

    def __len__(self) -> int:
        """Tokens, padding included."""
        return self.prompt.mask_BT.shape[1]


_FIELDS = ("keys", "values", "mask_BT")
# Lets torch.export and torch.func take caches as arguments and results.
register_pytree_node(
    PromptCache,
    lambda cache: ([getattr(cache, name) for name in _FIELDS], None),
    lambda parts, _: PromptCache(*parts),
    serialized_type_name="mm.models.cache.PromptCache",
    flatten_with_keys_fn=lambda cache: ([(GetAttrKey(k), getattr(cache, k)) for k in _FIELDS], None),  # pyright: ignore[reportArgumentType]
)
