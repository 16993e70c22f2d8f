"""Ways of quantizing a model for a re-test, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.families import quantizable_parts
from mm.layers.surgery import linears
from mm.quantization.config import SVDQuantConfig
from mm.quantization.quantize import quantize
from mm.world.calibration import captions

CALIBRATION = 16  # prompts
QUANTIZERS: dict[str, SVDQuantConfig] = {
    "w4a8": SVDQuantConfig(rank=32),
    "w4a8-r16": SVDQuantConfig(rank=16),
    "w4a4": SVDQuantConfig(rank=32, activation_bits=4),
    "w4a4-r16": SVDQuantConfig(rank=16, activation_bits=4),
    "int4": SVDQuantConfig(rank=0, smooth=False, gptq=False, activation_bits=16, data_free=True),
}
NAMES = (*QUANTIZERS, "nf4")
# The 16 levels of NF4: quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
    0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
BLOCK = 64


def quantizer(name: str) -> Callable[[Any], object]:
    """A function that quantizes a pipeline of the world in place.

    Raises:
        UserError: for an unknown name, with the known ones.
    """
    if name == "nf4":
        return nf4
    if name not in QUANTIZERS:
        raise UserError(f"no quantization {name!r}; there are {', '.join(NAMES)}")
    config = QUANTIZERS[name]
    prompts = None if config.data_free else list(captions(CALIBRATION, 0))

    def run(pipe: Any) -> object:
        return quantize(pipe, config, calibration=prompts, progress=False)

    return run


@torch.no_grad()
def nf4(pipe: Any) -> int:
    """Rounds the weights of the drawing parts to NF4 in blocks of 64, kept in their own type; returns how many layers.

    This is what bitsandbytes' NF4 does to the weights; it computes in 16 bits, too.
    """
    layers = [layer for part in quantizable_parts(pipe).values() for _, layer in linears(part)]
    for layer in layers:
        layer.weight.copy_(nf4_rounded(layer.weight))
    return len(layers)


def nf4_rounded(weight: Tensor) -> Tensor:
    """The nearest NF4 values of a weight, in blocks of 64 of its flattened values."""
    flat = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
    size = flat.abs().amax(1, keepdim=True).clamp_min(1e-30)
    levels = torch.tensor(NF4, device=flat.device)
    edges = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(flat / size, edges)] * size).flatten()[: weight.numel()].reshape(weight.shape)
