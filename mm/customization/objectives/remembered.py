"""What the denoiser reads of prompts, encoded once each: text encoders stay as they are while a denoiser is trained.

Design choices
- Each prompt is encoded alone and kept in main memory, so that batches of any mix are put together from what is there.
  A T5 or a vision-language model takes longer than the denoiser's step on small pictures.
- Only for models whose text encoders lie outside of what is trained, and only where no word is trained
  (`mm.customization.customize` decides).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Remembered:
    """Conditions by key.

    Args:
        device: where batches are put together.
        joined: puts conditions of one prompt each together.
    """

    def __init__(self, device: torch.device, joined: Callable[[Sequence[Any]], Any]) -> None:
        self.device, self.joined = device, joined
        self.kept: dict[Hashable, Any] = {}

    def __call__(self, keys: Sequence[Hashable], made: Callable[[int], Any]) -> Any:
        """The conditions of keys as one batch; `made(k)` encodes the k-th where it has not been yet."""
        for k, key in enumerate(keys):
            if key not in self.kept:
                with torch.no_grad():
                    self.kept[key] = moved(made(k), torch.device("cpu"))
        return self.joined([moved(self.kept[key], self.device) for key in keys])


def moved(condition: Any, device: torch.device) -> Any:
    """A condition (a tensor, or a mapping or list of tensors and None) on a device."""
    if torch.is_tensor(condition):
        return condition.to(device)
    if isinstance(condition, dict):
        return {name: moved(value, device) for name, value in condition.items()}
    if isinstance(condition, list):
        return [moved(value, device) for value in condition]
    return condition


def stacked(conditions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mappings of tensors (1, ...) or lists as one mapping, one row after the other."""
    rows: dict[str, list[Any]] = {name: [one[name] for one in conditions] for name in conditions[0]}
    return {
        name: torch.cat(values) if torch.is_tensor(values[0]) else [x for value in values for x in value]
        for name, values in rows.items()
    }


def padded(texts: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Text features (1, T, D) of different lengths as (B, T, D), and their mask (B, T); no mask counts all tokens."""
    longest = max(text.shape[1] for text in texts)
    full, seen = [], []
    for text, mask in zip(texts, masks, strict=True):
        given = torch.ones(text.shape[:2], dtype=torch.long, device=text.device) if mask is None else mask
        more = longest - text.shape[1]
        full.append(torch.nn.functional.pad(text, (0, 0, 0, more)))
        seen.append(torch.nn.functional.pad(given, (0, more)))
    return torch.cat(full), torch.cat(seen)
