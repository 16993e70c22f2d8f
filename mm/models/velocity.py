"""The velocity decoder: from the trunk's features and noisy latents to a flow's velocity.

Design choices
- DDT's decoder (Wang et al. 2025, arXiv 2504.05741): it has no text input; adaLN of each token is conditioned on that
  token's feature, so the trunk's features may be shared between neighbouring steps.
- Velocity = noise - clean, so that x_sigma = (1 - sigma) clean + sigma noise moves by velocity * d(sigma): the
  convention of diffusers' flow-matching schedulers.

Legend: B batch, C latent channels, L = H * W tokens, D width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from mm.layers.entry_points import ForwardMixin
from mm.models import layers


class VelocityLayer(nn.Module):
    """Self-attention and feed-forward, both modulated per token."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm_1 = layers.Norm(width)
        self.attn = layers.SelfProjections(width, heads)
        self.norm_2 = layers.Norm(width)
        self.ff = layers.FeedForward(width, ratio)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BLD: torch.Tensor, condition_BLD: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(condition_BLD).chunk(6, -1)
        q, k, v = self.attn(layers.modulate(self.norm_1(x_BLD), shift_a, scale_a))
        seen = layers.attend(layers.rotate(q, angles), layers.rotate(k, angles), v)
        x_BLD = torch.addcmul(x_BLD, gate_a, self.attn.to_out(seen))
        return torch.addcmul(x_BLD, gate_f, self.ff(layers.modulate(self.norm_2(x_BLD), shift_f, scale_f)))


class VelocityDecoder(ForwardMixin, ModelMixin, ConfigMixin):
    """A few layers that turn features and noisy latents into velocity."""

    _repeated_blocks = ["VelocityLayer"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        *,
        feature_width: int = 256,
        width: int = 256,
        depth: int = 2,
        heads: int = 4,
        ratio: int = 4,
        latent_channels: int = 16,
    ) -> None:
        super().__init__()
        self.latent_in = nn.Linear(latent_channels, width)
        self.feature_in = nn.Linear(feature_width, width)
        self.sigma_embedding = layers.SigmaEmbedding(width)
        self.layers = nn.ModuleList(VelocityLayer(width, heads, ratio) for _ in range(depth))
        self.norm_out = layers.Norm(width)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.velocity_out = nn.Linear(width, latent_channels)
        layers.init_linears(self)
        layers.zero(self.modulation_out, self.velocity_out)
        for layer in self._stack:
            # DDT conditions through adaLN alone, so the gates start open (bias one) and the projections at zero.
            layers.zero(layer.modulation, layer.attn.to_out, layer.ff.down)
            gates = layer.modulation.bias.data.view(6, -1)
            gates[2].fill_(1.0)
            gates[5].fill_(1.0)

    @property
    def _stack(self) -> list[VelocityLayer]:
        return cast("list[VelocityLayer]", self.layers)  # a ModuleList has no element type

    def forward(self, latents_BCHW: torch.Tensor, sigma_B: torch.Tensor, features_BLD: torch.Tensor) -> torch.Tensor:
        """Velocity (B, C, H, W) at noise level `sigma` (B,) in [0, 1]."""
        height, width = latents_BCHW.shape[2:]
        x_BLD = self.latent_in(latents_BCHW.flatten(2).transpose(1, 2))
        condition = F.silu(self.feature_in(features_BLD) + self.sigma_embedding(sigma_B)[:, None])
        angles = layers.picture_angles(height, width, self.config.width // self.config.heads, x_BLD.device)
        for layer in self._stack:
            x_BLD = layer(x_BLD, condition, angles)
        shift, scale = self.modulation_out(condition).chunk(2, -1)
        velocity_BLC = self.velocity_out(layers.modulate(self.norm_out(x_BLD), shift, scale))
        return velocity_BLC.transpose(1, 2).unflatten(-1, (height, width))
