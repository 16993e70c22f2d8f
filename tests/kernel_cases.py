"""Random quantized layers, and how close to the reference an output must be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mm import kernels
from mm.kernels import dispatch
from mm.kernels.packing import integers_of

CPU = dispatch.absence("cpu") is None
needs_cpu = pytest.mark.skipif(not CPU, reason="the C++ extension is not built here")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One random quantized layer with its input."""

    x: torch.Tensor
    weight: torch.Tensor
    weight_scales: torch.Tensor
    bias: torch.Tensor | None
    smooth: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None
    branch_scales: torch.Tensor | None

    def arguments(self) -> dict[str, torch.Tensor | None]:
        return dict(self.__dict__)


def make(tokens, outputs, inputs, *, rank=16, dtype=torch.float32, seed=0, extras=True, weight_bits=4) -> Layer:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=rng) * scale

    weight, weight_scales = kernels.quantize_weight(
        normal(outputs, inputs, scale=inputs**-0.5), torch.float16 if seed % 2 else torch.bfloat16
    )
    if weight_bits == 8:
        weight = torch.randint(-128, 128, (outputs, 2 * weight.shape[1]), generator=rng, dtype=torch.int8)
        weight[:, inputs:] = 0
        weight_scales = weight_scales / 17
    return Layer(
        x=normal(tokens, inputs).to(dtype),
        weight=weight,
        weight_scales=weight_scales,
        bias=normal(outputs).to(dtype) if extras else None,
        smooth=(normal(inputs).abs() + 0.5).to(dtype) if extras else None,
        down=normal(rank, inputs, scale=inputs**-0.5).to(dtype) if rank else None,
        up=normal(outputs, rank, scale=rank**-0.5).to(dtype) if rank else None,
        branch_scales=normal(rank) if rank and extras else None,
    )


def close(got, want, *, dtype, ties=0.0):
    """Within fp32's rounding over the sums, or the last bit of a 16-bit output; `ties` is allowed on top."""
    bound = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    error = (got.double() - want.double()).abs()
    limit = bound * (want.double().abs() + 4) + ties
    assert (error <= limit).all(), f"off by {(error / limit).max():.2f} limits"


def moved_products(layer: Layer, got: torch.Tensor, want: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What rounding to the other side of an edge may change of the outputs.

    An input on the edge between two steps may fall to either side, by one step: then just that difference is allowed.

    Args:
        layer: the layer whose inputs were rounded.
        got: int8 (M, C), a backend's rounded inputs.
        want: int8 (M, C), the reference's.
        scales: (M, 1 or G), the reference's.

    Returns:
        (M, N), float64.
    """
    moved = (got.int() - want.int()).abs()
    assert moved.max() <= 1 and moved.float().mean() <= 0.01
    steps = scales.double().repeat_interleave(moved.shape[1] // scales.shape[1], 1)
    weight = integers_of(layer.weight).double() * layer.weight_scales.double().repeat_interleave(64, 1)
    return (moved * steps) @ weight.abs().T


ROUNDINGS = [(8, 0, False, 0.0), (8, 64, False, 0.0), (4, 64, False, 0.0), (4, 64, True, 0.171875), (4, 0, False, 0.5)]
