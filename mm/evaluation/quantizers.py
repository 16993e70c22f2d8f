"""Ways of quantizing a model for a re-test, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mm.core.errors import UserError
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


def quantizer(name: str) -> Callable[[Any], object]:
    """A function that quantizes a pipeline of the world in place.

    Raises:
        UserError: for an unknown name, with the known ones.
    """
    if name not in QUANTIZERS:
        raise UserError(f"no quantization {name!r}; there are {', '.join(QUANTIZERS)}")
    config = QUANTIZERS[name]
    prompts = None if config.data_free else list(captions(CALIBRATION, 0))

    def run(pipe: Any) -> object:
        return quantize(pipe, config, calibration=prompts, progress=False)

    return run
