"""The layers of the trunk's two streams: text and picture.

Legend: B batch, T text tokens, P picture tokens with the mode token, D width, H heads, E = D / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mm.layers.entry_points import ForwardMixin, entry_point
from mm.models import layers


class WordEmbedding(nn.Embedding):
    """Word embeddings that are also the output weights of the text head."""

    def forward(self, ids_BT: torch.Tensor | None = None, *, states_BTD: torch.Tensor | None = None) -> torch.Tensor:
        """Vectors (B, T, D) of ids, or logits (B, T, V) of states."""
        if states_BTD is not None:
            return F.linear(states_BTD, self.weight.to(states_BTD.dtype))
        assert ids_BT is not None
        return super().forward(ids_BT)


class TextLayer(ForwardMixin, nn.Module):
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

    @entry_point
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


class PictureLayer(ForwardMixin, nn.Module):
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
        return self._run(x_BPD, shared_6, angles, text_k, text_v, mask)[0]

    @entry_point
    def with_keys(
        self,
        x_BPD: torch.Tensor,
        shared_6: torch.Tensor,
        angles: torch.Tensor,
        text_k: torch.Tensor,
        text_v: torch.Tensor,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `forward`; also the keys and values (B, T + P, H, E) of prompt and picture."""
        return self._run(x_BPD, shared_6, angles, text_k, text_v, mask)

    @entry_point
    def with_stored(
        self,
        x_BND: torch.Tensor,
        shared_6: torch.Tensor,
        angles: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        places_BN: torch.Tensor,
    ) -> torch.Tensor:
        """Output tokens (B, N, D) that attend to stored keys and values (B, T + P, H, E), and replace theirs there.

        `angles` are those of the N tokens, `places_BN` their places among the stored ones.
        """
        mod = self._modulations(shared_6)
        q, k, v = self.attn(layers.modulate(self.norm_1(x_BND), mod[0], mod[1]))
        row_B1 = torch.arange(len(x_BND), device=x_BND.device)[:, None]
        keys[row_B1, places_BN], values[row_B1, places_BN] = layers.rotate(k, angles), v
        return self._attended(x_BND, mod, layers.attend(layers.rotate(q, angles), keys, values, mask))

    def _run(
        self,
        x_BPD: torch.Tensor,
        shared_6: torch.Tensor,
        angles: torch.Tensor,
        text_k: torch.Tensor,
        text_v: torch.Tensor,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mod = self._modulations(shared_6)
        q, k, v = self.attn(layers.modulate(self.norm_1(x_BPD), mod[0], mod[1]))
        # Text keys are not rotated (position zero), so that a picture token's own position can decide which words it
        # attends to.
        q, k = layers.rotate(q, angles), layers.rotate(k, angles)
        all_k, all_v = torch.cat([text_k, k], 1), torch.cat([text_v, v], 1)
        return self._attended(x_BPD, mod, layers.attend(q, all_k, all_v, mask)), all_k, all_v

    def _modulations(self, shared_6: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift, scale and gate of attention, then of the feed-forward."""
        return (shared_6 + self.modulation.to(shared_6.dtype)).unbind(-2)

    def _attended(self, x_BPD: torch.Tensor, mod: tuple[torch.Tensor, ...], seen_BPD: torch.Tensor) -> torch.Tensor:
        """Output tokens from what attention gave."""
        x = torch.addcmul(x_BPD, mod[2], self.attn.to_out(seen_BPD))
        return torch.addcmul(x, mod[5], self.ff(layers.modulate(self.norm_2(x), mod[3], mod[4])))
