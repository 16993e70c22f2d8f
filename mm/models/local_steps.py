"""Local steps of the trunk: features of some picture tokens, from cached keys and values of the others.

ReCAP (Liu et al. 2025, arXiv 2505.19089): when a picture is filled in or revised token by token, most tokens are the
same at the next step, and what they offer to attention hardly changes. A full step stores the keys and values of all
picture tokens. The local steps after it compute the tokens that change alone, and attend to the stored ones.

Legend: B batch, N tokens that are computed, L picture tokens, P = L + 1 with the mode token, T prompt tokens, D width,
H heads, E = D / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from mm.layers.entry_points import entry_point
from mm.models import layers
from mm.models.cache import PromptCache

if TYPE_CHECKING:
    from mm.models.trunk import Trunk


@dataclass(frozen=True, slots=True)
class PictureCache:
    """Per layer keys and values (B, T + P, H, E) of prompt and picture, which local steps update in place."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mask: torch.Tensor

    def __len__(self) -> int:
        return self.keys[0].shape[0]


class LocalSteps:
    """What `Trunk` adds to compute a step in part."""

    @entry_point
    def full_step(
        self: Any, latents_BCHW: torch.Tensor, masked_BL: torch.Tensor, prompt: PromptCache
    ) -> tuple[torch.Tensor, PictureCache]:
        """As `Trunk.forward` in codes mode; also the cache for local steps.

        Args:
            latents_BCHW: Latents of unit deviation; those of masked tokens do not count.
            masked_BL: True where a token is not known.
            prompt: The prompts' cache, one for each picture.

        Returns:
            Features (B, L, D) and the cache.
        """
        trunk: Trunk = self
        if len(prompt) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures but {len(prompt)} prompts in the cache; repeat the cache")
        x_BPD, sigma = trunk._picture_tokens(latents_BCHW, masked_BL.float(), "codes", masked_BL)
        shared, angles = trunk._modulation(sigma), _angles(trunk, latents_BCHW)
        mask = F.pad(prompt.mask_BT, (0, x_BPD.shape[1]), value=True)[:, None, None, :]
        keys, values = [], []
        for i, layer in enumerate(trunk._picture_stack):
            x_BPD, k, v = layer.with_keys(x_BPD, shared, angles, prompt.keys[i], prompt.values[i], mask)
            keys.append(k)
            values.append(v)
        return trunk.norm_out(x_BPD)[:, 1:], PictureCache(tuple(keys), tuple(values), mask)

    @entry_point
    def local_step(
        self: Any, latents_BCHW: torch.Tensor, masked_BL: torch.Tensor, cache: PictureCache, places_BN: torch.Tensor
    ) -> torch.Tensor:
        """Features of some tokens.

        Args:
            latents_BCHW: Latents of unit deviation, now.
            masked_BL: True where a token is not known, now.
            cache: Of the last full step; the keys and values of the tokens computed here are replaced in it.
            places_BN: Which tokens, each once a picture.

        Returns:
            Features (B, N, D), in the order of `places_BN`.
        """
        trunk: Trunk = self
        x_BPD, sigma = trunk._picture_tokens(latents_BCHW, masked_BL.float(), "codes", masked_BL)
        # the mode token is first, and always computed: it sees every change
        row_B1, at_BN = torch.arange(len(x_BPD), device=x_BPD.device)[:, None], F.pad(places_BN + 1, (1, 0))
        x_BND, shared = x_BPD[row_B1, at_BN], trunk._modulation(sigma[row_B1, at_BN])
        angles = _angles(trunk, latents_BCHW)[at_BN]
        stored_BN = at_BN + cache.keys[0].shape[1] - x_BPD.shape[1]
        for i, layer in enumerate(trunk._picture_stack):
            x_BND = layer.with_stored(x_BND, shared, angles, cache.keys[i], cache.values[i], cache.mask, stored_BN)
        return trunk.norm_out(x_BND)[:, 1:]


def _angles(trunk: Trunk, latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Rotary angles (P, E / 2); the mode token has position zero."""
    height, width = latents_BCHW.shape[2:]
    channels = trunk.config.width // trunk.config.heads
    return F.pad(layers.picture_angles(height, width, channels, latents_BCHW.device), (0, 0, 1, 0))
