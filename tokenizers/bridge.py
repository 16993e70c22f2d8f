"""TokenBridge (arXiv 2503.16430): continuous latents to discrete codes, channel by channel, after training.

Design choices
- Each channel has its own `levels` centres; nothing of the autoencoder changes, so both heads draw the very same
  latents.
- Two kinds of bins. Gaussian: equally likely cells of the standard normal, clamped to +-3, each standing for its mean.
  Lloyd-Max: the centres which minimize the squared error on measured latents (never worse there, and cheap to fit).
- A value is sent to its nearest centre: boundaries are midpoints, so that quantizing a centre gives it back exactly.
- `order` is the channels' order for a head that is causal over channels: falling low-frequency energy, measured by FFT
  on latents. Codes themselves stay in the channels' natural order; only the head permutes.

Legend: B batch, C channels, H height, W width, N values of one channel, K levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from mm.layers.entry_points import ForwardMixin, entry_point

BINS = ("gaussian", "lloyd-max")


def gaussian_centres(levels: int, clamp: float = 3.0) -> Tensor:
    """Means of the standard normal within `levels` cells of equal probability, boundaries within +-clamp (K)."""
    if levels < 2:
        raise ValueError(f"levels is {levels}; give at least 2")
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    inner = normal.icdf(torch.arange(1, levels, dtype=torch.float64) / levels).clamp(-clamp, clamp)
    edges = torch.cat([inner.new_tensor([-clamp]), inner, inner.new_tensor([clamp])])
    density, mass = normal.log_prob(edges).exp(), normal.cdf(edges)
    return ((density[:-1] - density[1:]) / (mass[1:] - mass[:-1])).float()


def lloyd_max_centres(values_N: Tensor, levels: int, iterations: int = 100) -> Tensor:
    """Centres (K) of least squared error for one channel's values: one-dimensional k-means, from the quantiles."""
    ordered = values_N.flatten().double().sort().values
    if len(ordered) < levels:
        raise ValueError(f"{len(ordered)} values cannot fit {levels} levels; give more latents")
    total = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    # The best density of centres is the cube root of the values' own: for a normal, one sqrt(3) times as wide.
    centres = ordered.mean() + ordered.std() * 3**0.5 * gaussian_centres(levels).double()
    for _ in range(iterations):
        edges = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        stops = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([len(ordered)])])
        counts = stops[1:] - stops[:-1]
        means = (total[stops[1:]] - total[stops[:-1]]) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres).sort().values
    return centres.float()


def low_frequency_order(latents_BCHW: Tensor, keep: float = 0.5) -> list[int]:
    """Channels by falling energy within the lowest `keep` of spatial frequencies.

    Every channel has unit deviation, so this is the share of a channel's energy that lies in large shapes.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}; give a share of the frequencies, from 0 to 1")
    height, width = latents_BCHW.shape[2:]
    power = torch.fft.fft2(latents_BCHW.double(), norm="ortho").abs().square().mean(0)
    fy, fx = torch.fft.fftfreq(height).abs()[:, None], torch.fft.fftfreq(width).abs()[None, :]
    low = torch.maximum(fy, fx) <= 0.5 * keep
    energy_C = (power * low).sum((1, 2))
    return torch.argsort(energy_C, descending=True).tolist()


class Bridge(ForwardMixin, ModelMixin, ConfigMixin):
    """Latents with unit deviation (B, C, H, W) to codes (B, C, H, W) in [0, levels), and back."""

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        levels: int = 64,
        bins: str = "gaussian",
        order: Sequence[int] | None = None,
        tokens: int = 64,
    ) -> None:
        super().__init__()
        if bins not in BINS:
            raise ValueError(f"bins is {bins!r}; give one of {', '.join(BINS)}")
        if order is not None and sorted(order) != list(range(channels)):
            raise ValueError(f"order is {list(order)}; give each of the {channels} channels once")
        centres_CK = gaussian_centres(levels).expand(channels, levels).clone()
        self.centres_CK = nn.Parameter(centres_CK, requires_grad=False)

    @property
    def order(self) -> list[int]:
        """Channels in the order in which a causal head predicts them."""
        order = self.config.order
        return list(range(self.config.channels)) if order is None else list(order)

    @classmethod
    def fit(cls, latents_BCHW: Tensor, *, levels: int = 64, bins: str = "lloyd-max") -> Bridge:
        """A bridge with its bins and its order measured on latents."""
        channels, height, width = latents_BCHW.shape[1:]
        order = low_frequency_order(latents_BCHW)
        bridge = cls(channels=channels, levels=levels, bins=bins, order=order, tokens=height * width)
        if bins == "lloyd-max":
            rows = [lloyd_max_centres(latents_BCHW[:, channel], levels) for channel in range(channels)]
            bridge.centres_CK.data = torch.stack(rows)
        return bridge

    @entry_point
    def quantize(self, latents_BCHW: Tensor) -> Tensor:
        """Codes, int64: the index of the nearest centre."""
        self._check(latents_BCHW)
        edges_CK = (self.centres_CK[:, 1:].float() + self.centres_CK[:, :-1].float()) / 2
        values_CN = latents_BCHW.float().transpose(0, 1).flatten(1).contiguous()
        codes_CN = torch.searchsorted(edges_CK.contiguous(), values_CN)
        return codes_CN.unflatten(1, (latents_BCHW.shape[0], *latents_BCHW.shape[2:])).transpose(0, 1).contiguous()

    @entry_point
    def dequantize(self, codes_BCHW: Tensor) -> Tensor:
        """The latents that codes stand for."""
        self._check(codes_BCHW)
        codes_CN = codes_BCHW.transpose(0, 1).flatten(1)
        values_CN = self.centres_CK.gather(1, codes_CN)
        return values_CN.unflatten(1, (codes_BCHW.shape[0], *codes_BCHW.shape[2:])).transpose(0, 1).contiguous()

    def straight_through(self, latents_BCHW: Tensor) -> Tensor:
        """Quantized values whose gradient is that of the latents: lets the encoder be tuned through the bins."""
        quantized = self.dequantize(self.quantize(latents_BCHW.detach()))
        return latents_BCHW + (quantized - latents_BCHW).detach()

    def bits_per_picture(self) -> float:
        return self.config.tokens * self.config.channels * math.log2(self.config.levels)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        return self.dequantize(self.quantize(latents_BCHW))

    def _check(self, tensor_BCHW: Tensor) -> None:
        if tensor_BCHW.ndim != 4 or tensor_BCHW.shape[1] != self.config.channels:
            raise ValueError(f"shape {tuple(tensor_BCHW.shape)}; give (B, {self.config.channels}, H, W)")
