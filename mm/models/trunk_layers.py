"""The layers of the trunk's two streams: text and picture.

Legend: B batch, T text tokens, P picture tokens with the mode token, D width, H heads, E = D / H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mm.models import layers


class TextLayer(nn.Module):
    """A causal text layer that also projects keys and values for picture tokens."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm_1 = layers.Norm(width)
        self.attn = layers.SelfProjections(width, heads)
        self.norm_2 = layers.Norm(width)
        self.ff = layers.FeedForward(width, ratio)
        self.to_k_pic = nn.Linear(width, width, bias=False)
        self.to_v_pic = nn.Linear(width, width, bias=False)
        self.norm_k_pic = layers.Norm(width // heads)

    def for_pictures(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, T, H, E) that picture tokens attend to at this layer."""
        normed = self.norm_1(x_BTD)
        k, v = (f(normed).unflatten(-1, (self.attn.heads, -1)) for f in (self.to_k_pic, self.to_v_pic))
        return self.norm_k_pic(k), v

    def forward(
        self,
        x_BTD: torch.Tensor,
        angles: torch.Tensor,
        mask: torch.Tensor,
        past_k: torch.Tensor | None = None,
        past_v: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output tokens (B, T, D), and keys and values of all tokens so far."""
        q, k, v = self.attn(self.norm_1(x_BTD))
        k = layers.rotate(k, angles)
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
        x_BTD = x_BTD + self.attn.to_out(layers.attend(layers.rotate(q, angles), k, v, mask))
        return x_BTD + self.ff(self.norm_2(x_BTD)), k, v


class PictureLayer(nn.Module):
    """A bidirectional picture layer with adaLN, attending to its own tokens and to the prompt's cache."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm_1 = layers.Norm(width)
        self.attn = layers.SelfProjections(width, heads)
        self.norm_2 = layers.Norm(width)
        self.ff = layers.FeedForward(width, ratio)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(
        self,
        x_BPD: torch.Tensor,
        shared_6: torch.Tensor,
        angles: torch.Tensor,
        text_k: torch.Tensor,
        text_v: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Output tokens (B, P, D), attending to the prompt's keys and values and to the picture's own."""
        k, v, finish = self.keys_and_rest(x_BPD, shared_6, angles)
        return finish(torch.cat([text_k, k], 1), torch.cat([text_v, v], 1), mask)

    def keys_and_rest(
        self, x_BPD: torch.Tensor, shared_6: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[..., torch.Tensor]]:
        """Keys and values of the tokens, and the rest of the layer as a function of all keys, values and their mask."""
        mod = shared_6 + self.modulation.to(shared_6.dtype)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = mod.unbind(-2)
        q, k, v = self.attn(layers.modulate(self.norm_1(x_BPD), shift_a, scale_a))
        q, k = layers.rotate(q, angles), layers.rotate(k, angles)

        def finish(all_k: torch.Tensor, all_v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            # Text keys are not rotated (position zero), so that a picture token's own position can decide which words
            # it attends to.
            x = torch.addcmul(x_BPD, gate_a, self.attn.to_out(layers.attend(q, all_k, all_v, mask)))
            return torch.addcmul(x, gate_f, self.ff(layers.modulate(self.norm_2(x), shift_f, scale_f)))

        return k, v, finish
