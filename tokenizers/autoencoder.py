"""The generation tokenizer: a convolutional autoencoder, 3 x 128 x 128 pictures to 16 x 8 x 8 latents.

Design choices
- Shaped for two CPU cores: space-to-depth in place of high-resolution convolutions, most of the parameters at 16 x 16
  and 8 x 8, no normalization layers (every residual branch starts at zero, which is all the stabilizing that this depth
  needs).
- A light encoder (pictures are encoded once and cached) and a heavier decoder (its output is what a user sees).
- Deterministic, with no KL term: training keeps every channel at zero mean and unit deviation by normalizing over the
  batch (REPA-E's choice) and adds noise before decoding, so that a latent which is a little off still decodes.
- An optional enlarger writes pictures of twice the side: it adds detail, from the decoder's last features, to the
  enlarged picture. The decoder itself does not change, so that both sizes show the same picture.
- `latents_mean` and `latents_std` live in the config. `encode` applies them, the decoder is trained on the normalized
  latents, so that latents have one scale everywhere else.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from mm.layers.entry_points import ForwardMixin, entry_point


def normalize(
    latents_BCHW: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, *, reverse: bool = False
) -> Tensor:
    """(latents - mean) / std per channel, or its reverse; unchanged before the first measurement (None)."""
    if mean is None or std is None:
        return latents_BCHW
    mean_C11 = torch.tensor(mean, dtype=latents_BCHW.dtype, device=latents_BCHW.device)[:, None, None]
    std_C11 = torch.tensor(std, dtype=latents_BCHW.dtype, device=latents_BCHW.device)[:, None, None]
    return latents_BCHW * std_C11 + mean_C11 if reverse else (latents_BCHW - mean_C11) / std_C11


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.SiLU()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.get_parameter("conv2.bias"))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv2(self.act(self.conv1(self.act(x_BCHW))))


def residual_blocks(channels: int, depth: int) -> list[nn.Module]:
    return [ResidualBlock(channels) for _ in range(depth)]


def encoder_layers(channels: int, widths: Sequence[int], depths: Sequence[int]) -> nn.Sequential:
    """Pictures to raw latents; `widths` and `depths` are those at a quarter, an eighth and a sixteenth of the side."""
    quarter, eighth, sixteenth = widths
    return nn.Sequential(
        nn.PixelUnshuffle(4),
        nn.Conv2d(48, quarter, 3, padding=1),
        *residual_blocks(quarter, depths[0]),
        nn.PixelUnshuffle(2),
        nn.Conv2d(4 * quarter, eighth, 1),
        *residual_blocks(eighth, depths[1]),
        nn.PixelUnshuffle(2),
        nn.Conv2d(4 * eighth, sixteenth, 1),
        *residual_blocks(sixteenth, depths[2]),
        nn.SiLU(),
        nn.Conv2d(sixteenth, channels, 1),
    )


def decoder_layers(
    channels: int, widths: Sequence[int], depths: Sequence[int], refine: int, refine_depth: int = 0
) -> nn.Sequential:
    """Latents to pictures; `widths` and `depths` are those at a sixteenth, an eighth and a quarter of the side.

    `refine` and `refine_depth` are the width and the depth at half of the side.
    """
    sixteenth, eighth, quarter = widths
    return nn.Sequential(
        nn.Conv2d(channels, sixteenth, 3, padding=1),
        *residual_blocks(sixteenth, depths[0]),
        nn.Conv2d(sixteenth, 4 * eighth, 1),
        nn.PixelShuffle(2),
        *residual_blocks(eighth, depths[1]),
        nn.Conv2d(eighth, 4 * quarter, 1),
        nn.PixelShuffle(2),
        *residual_blocks(quarter, depths[2]),
        nn.Conv2d(quarter, 4 * refine, 1),
        nn.PixelShuffle(2),
        *residual_blocks(refine, refine_depth),
        nn.SiLU(),
        nn.Conv2d(refine, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )


def enlarger_layers(refine: int, width: int) -> nn.Sequential:
    """The decoder's features at half of the side to detail at twice the side; none at the start."""
    last = nn.Conv2d(width, 48, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.get_parameter("bias"))
    return nn.Sequential(nn.Conv2d(refine, width, 3, padding=1), nn.SiLU(), last, nn.PixelShuffle(4))


class Autoencoder(ForwardMixin, ModelMixin, ConfigMixin):
    """Pictures in [-1, 1] to latents with unit deviation per channel, and back."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        encoder_widths: tuple[int, ...] = (48, 96, 160),
        encoder_depths: tuple[int, ...] = (1, 1, 1),
        decoder_widths: tuple[int, ...] = (160, 96, 64),
        decoder_depths: tuple[int, ...] = (2, 2, 1),
        refine_width: int = 32,
        refine_depth: int = 0,
        enlarger_width: int = 0,
        sample_size: int = 128,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != latent_channels:
                raise ValueError(f"{name} has {len(values)} values; give one for each of {latent_channels} channels")
        self.encoder = encoder_layers(latent_channels, encoder_widths, encoder_depths)
        self.decoder = decoder_layers(latent_channels, decoder_widths, decoder_depths, refine_width, refine_depth)
        self.enlarger = enlarger_layers(refine_width, enlarger_width) if enlarger_width else None

    @property
    def scale_factor(self) -> int:
        return 16

    @property
    def scales(self) -> tuple[int, ...]:
        """By what the sides of decoded pictures can be larger than those of encoded ones."""
        return (1,) if self.enlarger is None else (1, 2)

    @entry_point
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], sides divisible by 16, to latents (B, 16, H / 16, W / 16)."""
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3 or any(side % 16 for side in images_BCHW.shape[2:]):
            raise ValueError(f"pictures of shape {tuple(images_BCHW.shape)}; give (B, 3, H, W), sides divisible by 16")
        return normalize(self.raw_latents(images_BCHW), self.config.latents_mean, self.config.latents_std)

    def raw_latents(self, images_BCHW: Tensor) -> Tensor:
        """Latents on the encoder's own scale."""
        return self.encoder(images_BCHW.to(self.dtype))

    def training_latents(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Latents normalized over the batch, which is how mean and deviation stay where they are; no auxiliary loss."""
        raw_BCHW = self.encoder(images_BCHW).float()
        return F.batch_norm(raw_BCHW, None, None, training=True), raw_BCHW.new_zeros(())

    @entry_point
    def decode(self, latents_BCHW: Tensor, scale: int = 1) -> Tensor:
        """Latents with unit deviation (B, 16, H, W) to pictures (B, 3, 16 H, 16 W) in [-1, 1].

        `scale` 2 writes twice the sides, by the enlarger.
        """
        if scale not in self.scales:
            raise ValueError(f"scale is {scale}; this autoencoder writes {' or '.join(map(str, self.scales))} times")
        if latents_BCHW.ndim != 4 or latents_BCHW.shape[1] != self.config.latent_channels:
            channels = self.config.latent_channels
            raise ValueError(f"latents of shape {tuple(latents_BCHW.shape)}; give (B, {channels}, H, W)")
        if self.enlarger is None or scale == 1:
            return self.decoder(latents_BCHW.to(self.dtype)).clamp(-1, 1)
        return self.enlarged(*self.features(latents_BCHW)).clamp(-1, 1)

    def features(self, latents_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The picture (B, 3, H, W) of latents, not clamped, and the features (B, C, H / 2, W / 2) it is made of."""
        features = self.decoder[:-2](latents_BCHW.to(self.dtype))
        return self.decoder[-2:](features), features

    def enlarged(self, picture_BCHW: Tensor, features_BCHW: Tensor) -> Tensor:
        """A picture at twice the side, with the enlarger's detail."""
        assert self.enlarger is not None
        return F.interpolate(picture_BCHW, scale_factor=2, mode="nearest") + self.enlarger(features_BCHW)

    def bits_per_picture(self) -> float:
        """The latents at their stored precision, 16 bits a number: continuous latents have no smaller honest figure."""
        side = self.config.sample_size // self.scale_factor
        return 16.0 * self.config.latent_channels * side * side

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.decode(self.encode(images_BCHW))
