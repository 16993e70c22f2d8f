"""The interface of every vision tokenizer, used by pipelines, stages and benchmarks.

Pictures are (B, 3, H, W) in [-1, 1], latents (B, C, H / 16, W / 16) with unit deviation per channel.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class VisionTokenizer(Protocol):
    """Pictures to latents and back."""

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Latents of pictures; a quantized tokenizer returns the values that its codes stand for."""
        ...

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures of latents, within [-1, 1]."""
        ...

    def bits_per_picture(self) -> float:
        """Bits that one picture of the configured size needs."""
        ...
